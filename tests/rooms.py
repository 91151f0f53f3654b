"""The rooms of the package, what they import from each other, and the picture of both in docs/architecture.md.

python -m tests.rooms     # draws the picture again
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import optimum_mla

PACKAGE = Path(optimum_mla.__file__).parent
PAGE = PACKAGE.parent / "docs" / "architecture.md"
FLOORS = (
    ("core",),
    ("ops", "codec"),
    ("stack",),
    ("nn", "cache"),
    ("families", "io"),
    ("models",),
    ("weights",),
    ("calibrate", "plan"),
    ("convert", "export"),
    ("methods",),
    ("recovery", "report"),
    ("measure",),
    ("pipeline",),
)
"""The rooms from the lowest floor to the highest one. A file imports from its own room and from lower floors."""
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
PICTURE = re.compile(r"```mermaid\n.*?```", re.DOTALL)


def imported_rooms(node: ast.AST) -> Iterator[str]:
    """Yield the rooms of this package that an import statement names."""
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("optimum_mla."):
        yield (node.module or "").split(".")[1]
    elif isinstance(node, ast.Import):
        yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("optimum_mla."))


def imports() -> Iterator[tuple[Path, str, str]]:
    """Yield each file, its room, and a room that it imports, at the top of the file or inside a function."""
    for path in sorted(PACKAGE.glob("*/**/*.py")):
        file = path.relative_to(PACKAGE)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for other in imported_rooms(node):
                yield file, file.parts[0], other


def picture() -> str:
    """Return the rooms by floor, and an arrow from each room to those below it that no other arrow leads to."""
    direct: dict[str, set[str]] = {room: set() for room in FLOOR}
    for _, room, other in imports():
        if other != room:
            direct[room].add(other)
    reached: dict[str, set[str]] = {}
    for room in sorted(FLOOR, key=lambda room: FLOOR[room]):
        reached[room] = direct[room].union(*(reached[other] for other in direct[room]))
    lines = ["flowchart TD"]
    for level in reversed(range(len(FLOORS))):
        lines.append(f"  subgraph floor{level} [floor {level}]\n    {' ~~~ '.join(FLOORS[level])}\n  end")
    for room in sorted(FLOOR, key=lambda room: (-FLOOR[room], room)):
        implied = set().union(*(reached[other] for other in direct[room]))
        lines += [f"  {room} --> {other}" for other in sorted(direct[room] - implied)]
    return "```mermaid\n" + "\n".join(lines) + "\n```"


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(PICTURE.sub(lambda _: picture(), page), encoding="utf-8")
