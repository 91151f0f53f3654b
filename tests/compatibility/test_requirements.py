"""The lock and the lowest versions follow from pyproject.toml, and the page shows what was tested."""

from __future__ import annotations

import json
import re

import pytest
from packaging.requirements import Requirement

from tests.compatibility.requirements import LOCK, ROOT, direct_requirements, lowest, read_lock
from tests.compatibility.run import ENVIRONMENTS, PAGE, RESULT, installed, with_table


def test_the_lock_pins_every_direct_dependency_within_its_bounds() -> None:
    requirements, lock = direct_requirements("dev"), read_lock()
    assert lock.keys() == requirements.keys()
    assert {"torch", "transformers", "trl", "lm-eval", "pytest", "mypy"} <= lock.keys()
    for name, requirement in requirements.items():
        assert requirement.specifier.contains(lock[name]), name
    for line in LOCK.read_text(encoding="utf-8").splitlines()[1:]:
        assert re.fullmatch(r"[a-z0-9-]+==[\w.]+", line), line


def test_the_lowest_version_is_the_bound() -> None:
    assert lowest(Requirement("torch>=2.9")) == "torch==2.9"
    assert lowest(Requirement("torch>=2.9,<3")) == "torch==2.9"
    for text in ("torch", "torch==2.9", "torch<3"):
        with pytest.raises(ValueError, match="lower bound"):
            lowest(Requirement(text))
    for requirement in direct_requirements("dev").values():
        assert requirement.specifier.contains(lowest(requirement).partition("==")[2])


@pytest.mark.compat
def test_this_environment_is_within_the_bounds() -> None:
    versions = installed()
    for name, requirement in direct_requirements("test").items():
        assert requirement.specifier.contains(versions[name], prereleases=True), name


def test_the_page_shows_the_result() -> None:
    page, result = PAGE.read_text(encoding="utf-8"), json.loads(RESULT.read_text(encoding="utf-8"))
    assert result.keys() == set(ENVIRONMENTS)
    assert with_table(page, result) == page
    transformers = [result[name]["versions"]["transformers"] for name in ("oldest", "newest")]
    assert f"| transformers | {' | '.join(transformers)} |" in page
    assert all(result[name]["passed"] > 100 for name in result)


def test_the_oldest_tested_are_the_bounds_of_pyproject() -> None:
    versions = json.loads(RESULT.read_text(encoding="utf-8"))["oldest"]["versions"]
    for name, requirement in direct_requirements("test").items():
        pin = Requirement(lowest(requirement)).specifier
        assert pin.contains(versions[name]), f"{name}: run `make test-oldest` after a change of pyproject.toml"


def test_the_project_root_is_found() -> None:
    assert (ROOT / "pyproject.toml").exists()
