"""An output folder appears whole or not at all, and whether it can is known before the work."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from optimum_mla.core.errors import OutputError
from optimum_mla.io.folder import atomic_folder, check_output

NOBODY = 65534


@pytest.fixture
def ordinary_user() -> Iterator[Path]:
    """Make a folder that everybody may write, and go on as a user who is not root."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    yield folder
    if root:
        os.seteuid(0)
    for place, _, _ in os.walk(folder):
        Path(place).chmod(0o777)
    shutil.rmtree(folder)


def old_model(folder: Path) -> Path:
    """Make a folder that looks like a model."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def tree(folder: Path) -> list[str]:
    """Return all paths under a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


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
        with atomic_folder(tmp_path / "out", overwrite=True) as partial:
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


def test_weights_that_the_system_refuses_to_write_are_one_clear_error(tmp_path: Path) -> None:
    script = (
        "import resource, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from safetensors.torch import save_file\n"
        "from optimum_mla.core.errors import OutputError\n"
        "from optimum_mla.io.folder import atomic_folder\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n"
        "    with atomic_folder(Path(sys.argv[1])) as partial:\n"
        "        save_file({'weight': torch.zeros(10_000)}, partial / 'model.safetensors')\n"
        "except OutputError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "out") in done.stdout
    assert "too large" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_check_leaves_no_trace(tmp_path: Path) -> None:
    check_output(tmp_path / "some" / "where" / "out", {}, overwrite=False)
    assert list(tmp_path.iterdir()) == []
    model = old_model(tmp_path / "model")
    before = (model / "config.json").stat().st_ino
    assert check_output(model, {}, overwrite=True) == model
    assert tree(tmp_path) == ["model", "model/config.json"]
    assert (model / "config.json").stat().st_ino == before


def test_parents_of_a_failed_output_are_not_left(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "some" / "where" / "out"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(tmp_path / "some" / "where" / "out") as partial:
        (partial / "a").write_text("")
    assert (tmp_path / "some" / "where" / "out" / "a").is_file()


IMPOSSIBLE: dict[str, tuple[Callable[[Path], str], str]] = {
    "a mount point": (lambda folder: "/proc", "/proc is a mount point"),
    "a file system of the kernel": (lambda folder: "/proc/output", "No such file or directory"),
    "a folder in a file": (lambda folder: f"{folder}/file/out", "file is a file, so .* cannot lie in it"),
    "a name that is too long": (lambda folder: f"{folder}/{250 * 'x'}", "File name too long"),
    "a path that is too long": (lambda folder: f"{folder}/{20 * (250 * 'x' + '/')}out", "File name too long"),
    "links in a circle": (lambda folder: f"{folder}/circle", "circle"),
    "no such home": (lambda folder: "~nobody_has_this_name/out", "home directory"),
    "a null byte": (lambda folder: f"{folder}/\0", "null byte"),
    "a file": (lambda folder: f"{folder}/file", "is a file"),
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_the_file_system_does_not_allow_is_refused_at_the_start(case: str, tmp_path: Path) -> None:
    make, words = IMPOSSIBLE[case]
    (tmp_path / "file").write_text("")
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(OutputError, match=words):
        check_output(make(tmp_path), {}, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["circle", "file"]


def test_a_parent_that_cannot_be_written_is_refused_at_the_start(ordinary_user: Path) -> None:
    (ordinary_user / "parent").mkdir(mode=0o555)
    with pytest.raises(OutputError, match="Permission denied"):
        check_output(ordinary_user / "parent" / "out", {}, overwrite=False)
    with pytest.raises(OutputError, match="Permission denied"):
        check_output(ordinary_user / "parent" / "further" / "out", {}, overwrite=False)
    (ordinary_user / "parent").chmod(0o000)
    with pytest.raises(OutputError, match="Permission denied"):
        check_output(ordinary_user / "parent" / "out", {}, overwrite=False)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a folder of another user")
def test_a_folder_of_another_user_that_may_not_be_renamed_is_refused_at_the_start(ordinary_user: Path) -> None:
    os.seteuid(0)
    old_model(ordinary_user / "out").chmod(0o777)
    ordinary_user.chmod(0o1777)  # as in /tmp: only the owner renames
    os.seteuid(NOBODY)
    with pytest.raises(OutputError, match="Operation not permitted"):
        check_output(ordinary_user / "out", {}, overwrite=True)
    assert tree(ordinary_user) == ["out", "out/config.json"]


def test_a_folder_that_could_not_be_deleted_is_refused_at_the_start(ordinary_user: Path) -> None:
    locked = old_model(ordinary_user / "out") / "locked"
    locked.mkdir()
    (locked / "file").write_text("")
    locked.chmod(0o555)
    with pytest.raises(OutputError, match="locked is read-only"):
        check_output(ordinary_user / "out", {}, overwrite=True)
    assert tree(ordinary_user) == ["out", "out/config.json", "out/locked", "out/locked/file"]


def failing_rename(monkeypatch: pytest.MonkeyPatch, fails: Callable[[str, str], bool], code: int) -> None:
    """Let the system's rename fail for some names, as layered and network file systems do."""
    rename = os.rename

    def changed(old: str, new: str) -> None:
        if fails(os.fspath(old), os.fspath(new)):
            raise OSError(code, os.strerror(code), old, None, new)
        rename(old, new)

    monkeypatch.setattr(os, "rename", changed)


def test_a_folder_of_a_lower_layer_is_refused_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = old_model(tmp_path / "out")
    failing_rename(monkeypatch, lambda old, new: old == str(model), 18)  # what overlayfs says of such folders
    with pytest.raises(OutputError, match="cross-device"):
        check_output(model, {}, overwrite=True)
    assert tree(tmp_path) == ["out", "out/config.json"]


def test_a_failed_second_rename_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = old_model(tmp_path / "out")
    failing_rename(monkeypatch, lambda old, new: old.endswith(".partial"), 5)
    with (
        pytest.raises(OutputError, match=r"complete, in .*\.out\..*\.partial") as caught,
        atomic_folder(model, overwrite=True) as partial,
    ):
        (partial / "new.txt").write_text("new")
    assert (model / "config.json").is_file()
    assert str(partial) in str(caught.value)
    assert (partial / "new.txt").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == [partial.name, "out"]


def test_an_old_folder_that_does_not_come_back_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = old_model(tmp_path / "out")
    failing_rename(monkeypatch, lambda old, new: new == str(model), 5)
    with pytest.raises(OutputError) as caught, atomic_folder(model, overwrite=True) as partial:
        (partial / "new.txt").write_text("new")
    retired = partial.with_suffix(".old")
    assert (retired / "config.json").is_file()
    assert f"what {model} held is in {retired}" in str(caught.value)
    assert f"complete, in {partial}" in str(caught.value)


def test_an_interrupt_between_the_renames_brings_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = old_model(tmp_path / "out")

    def interrupted(old: str, new: str) -> bool:
        if old.endswith(".partial"):
            raise KeyboardInterrupt
        return False

    failing_rename(monkeypatch, interrupted, 5)
    with pytest.raises(KeyboardInterrupt), atomic_folder(model, overwrite=True) as partial:
        (partial / "new.txt").write_text("new")
    assert (model / "config.json").is_file()


def test_an_old_folder_that_is_not_deleted_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = old_model(tmp_path / "out")

    def refuse(folder: Path, **_: object) -> None:
        raise PermissionError(1, "Operation not permitted", str(folder))

    with atomic_folder(model, overwrite=True) as partial:
        (partial / "new.txt").write_text("new")
        monkeypatch.setattr(shutil, "rmtree", refuse)
    assert (model / "new.txt").is_file()
    assert str(partial.with_suffix(".old")) in caplog.text


def test_what_appears_during_the_work_is_not_replaced(tmp_path: Path) -> None:
    check_output(tmp_path / "out", {}, overwrite=False)
    with pytest.raises(OutputError, match="Directory not empty"), atomic_folder(tmp_path / "out") as partial:
        shutil.copytree(old_model(tmp_path / "out"), partial / "copy")
    assert (tmp_path / "out" / "config.json").is_file()
    assert (partial / "copy" / "config.json").is_file()


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_and_what_it_points_at_is_written(exists: bool, tmp_path: Path) -> None:
    if exists:
        old_model(tmp_path / "disk")
    (tmp_path / "out").symlink_to("disk")
    folder = check_output(tmp_path / "out", {}, overwrite=True)
    with atomic_folder(folder, overwrite=True) as partial:
        (partial / "new.txt").write_text("new")
    assert (tmp_path / "out").is_symlink()
    assert tree(tmp_path) == ["disk", "disk/new.txt", "out"]


def test_the_folder_that_one_works_in_may_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(old_model(tmp_path / "out"))
    folder = check_output(".", {}, overwrite=True)
    with atomic_folder(folder, overwrite=True) as partial:
        (partial / "new.txt").write_text("new")
    assert tree(tmp_path) == ["out", "out/new.txt"]
