"""A file imports from its own room and from the rooms below it, and the page on the architecture says so."""

from __future__ import annotations

import ast

from tests.rooms import FLOOR, PACKAGE, PAGE, PICTURE, imports, picture


def test_every_folder_is_a_room() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(FLOOR)


def test_imports_go_down() -> None:
    upward = [
        f"{file} imports {other}"
        for file, room, other in imports()
        if other != room and FLOOR.get(other, -1) >= FLOOR[room]
    ]
    assert upward == []


def test_the_picture_is_that_of_the_imports() -> None:
    found = PICTURE.search(PAGE.read_text(encoding="utf-8"))
    assert found is not None
    assert found[0] == picture(), "python -m tests.rooms draws it again"


def test_the_page_names_every_room_and_only_files_that_exist() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert [room for room in FLOOR if f"`{room}`" not in page] == []
    named = {word for word in page.split("`")[1::2] if word.endswith(".py")}
    assert named
    assert [
        name for name in sorted(named) if not (PACKAGE / name).is_file() and not (PAGE.parents[1] / name).is_file()
    ] == []


def test_nothing_that_only_one_system_has_is_imported_with_a_file() -> None:
    found = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in sorted(PACKAGE.glob("**/*.py"))
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", None), *(alias.name for alias in node.names)]
        if name in ("fcntl", "grp", "msvcrt", "pwd", "resource", "termios", "winreg")
    ]
    assert found == []
