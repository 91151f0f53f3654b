"""A file imports from its own room and from the rooms below it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import optimum_mla

PACKAGE = Path(optimum_mla.__file__).parent
FLOORS = (
    {"core"},
    {"ops", "codec"},
    {"stack"},
    {"nn", "cache"},
    {"families", "io"},
    {"models"},
    {"weights"},
    {"calibrate", "plan"},
    {"convert", "export"},
    {"methods"},
    {"recovery", "report"},
    {"measure"},
    {"pipeline"},
)
"""The rooms from the lowest floor to the highest one."""
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}


def imported_rooms(node: ast.AST) -> Iterator[str]:
    """The rooms of this package that an import statement names."""
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("optimum_mla."):
        yield (node.module or "").split(".")[1]
    elif isinstance(node, ast.Import):
        yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("optimum_mla."))


def upward_imports() -> list[str]:
    """Imports, at the top of a file or inside a function, of rooms that do not lie below."""
    found = []
    for path in sorted(PACKAGE.glob("*/**/*.py")):
        room = path.relative_to(PACKAGE).parts[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for other in imported_rooms(node):
                if other != room and FLOOR.get(other, -1) >= FLOOR[room]:
                    found.append(f"{path.relative_to(PACKAGE)} imports {other}")
    return found


def test_every_folder_is_a_room() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(FLOOR)


def test_imports_go_down() -> None:
    assert upward_imports() == []


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
