"""The page of counts is the one that belongs to the JSON, and archives are unpacked as far as they are wanted."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from tests.transformers_suite import counts
from tests.transformers_suite.families import KINDS, RUNS
from tests.transformers_suite.fetch import unpack
from tests.transformers_suite.overrides import OVERRIDES


def test_page_and_results_agree() -> None:
    results = json.loads(counts.RESULTS.read_text(encoding="utf-8"))
    assert counts.PAGE.read_text(encoding="utf-8") == counts.page(results)
    assert [(row["family"], row["form"], row["kind"]) for row in results["rows"]] == [
        (family, form, kind) for family, form in RUNS for kind in KINDS
    ]
    assert results["overrides"] == {name: override.reason for name, override in OVERRIDES.items()}
    for row in results["rows"]:
        assert row["source_passed"] >= 60  # windowed families skip many
        assert row["passed"] + row["overridden"] + row["missing"] >= row["source_passed"]


def test_only_the_tests_of_an_archive_are_unpacked(tmp_path: Path) -> None:
    names = ("tests/test_one.py", "tests/data.json", "tests/models/test_two.py", "src/test_three.py")
    for name in names:
        path = tmp_path / "pkg-1.0" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    with tarfile.open(tmp_path / "pkg.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "pkg-1.0", "pkg-1.0")
    target = tmp_path / "cache" / "tests"
    assert unpack(tmp_path / "pkg.tar.gz", target) == ["test_one.py"]
    assert sorted(path.name for path in target.iterdir()) == ["__init__.py", "test_one.py"]
    assert (target / "test_one.py").read_text() == names[0]


def test_an_archive_without_tests_is_refused(tmp_path: Path) -> None:
    (tmp_path / "setup.py").write_text("")
    with tarfile.open(tmp_path / "pkg.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "setup.py", "pkg-1.0/setup.py")
    with pytest.raises(ValueError, match=r"pkg\.tar\.gz: holds no tests"):
        unpack(tmp_path / "pkg.tar.gz", tmp_path / "cache" / "tests")
    assert not (tmp_path / "cache" / "tests").exists()
