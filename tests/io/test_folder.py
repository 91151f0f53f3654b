"""An output folder appears whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from optimum_mla.errors import OutputError
from optimum_mla.io.folder import atomic_folder


def test_the_folder_takes_its_name_at_the_end(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out") as partial:
        (partial / "a.txt").write_text("a")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "a.txt").read_text() == "a"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_block_leaves_the_old_folder(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")

    def write() -> None:
        with atomic_folder(tmp_path / "out") as partial:
            (partial / "new.txt").write_text("new")
            raise error

    with pytest.raises(error):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["old.txt"]


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="GB free"), atomic_folder(tmp_path / "out", needed_bytes=10**18):
        (tmp_path / "never.txt").write_text("")
    with pytest.raises(OutputError, match="No space left"), atomic_folder(tmp_path / "out"):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []
