"""Processes that make one measurement each, so that measurements share no memory and fail alone.

    python -m optimum_mla.pipeline.benchmarking.cells RESULT < REQUEST

The process reads the request from standard input and writes the result to the file RESULT. Both are JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optimum_mla.core.errors import MLAError, first_line, ran_out_of_memory
from optimum_mla.pipeline.benchmarking.measurements import (
    measure_memory,
    measure_quality,
    measure_speed,
    measure_tasks,
)
from optimum_mla.pipeline.benchmarking.subjects import Subject
from optimum_mla.stack.quiet import quiet_libraries

OUT_OF_MEMORY = "out of memory"
MODULE = "optimum_mla.pipeline.benchmarking.cells"
KILLED = 9
"""The signal by which the system ends a process where memory runs out. Windows has no name for it."""


class CellError(Exception):
    """A measurement failed; the message says why in one line."""


def run_cell(kind: str, request: dict[str, Any]) -> dict[str, Any]:
    """Run one measurement of `CELLS` in a fresh process, and return what its function returns.

    Args:
        kind: The kind of measurement.
        request: The keyword arguments of the function, with the fields of a `Subject` for each model.

    Raises:
        CellError: The measurement failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        done = subprocess.run(
            [sys.executable, "-m", MODULE, str(result)],
            input=json.dumps({"kind": kind, "request": request}),
            capture_output=True,
            text=True,
            env=os.environ,
        )
        if done.returncode == -KILLED:
            raise CellError(f"{OUT_OF_MEMORY}: the system ended the process")
        if done.returncode or not result.is_file():
            lines = done.stderr.strip().splitlines() or [f"the process ended with code {done.returncode}"]
            raise CellError(OUT_OF_MEMORY if ran_out_of_memory(CellError(lines[-1])) else lines[-1].strip())
        found = json.loads(result.read_text(encoding="utf-8"))
    if "problem" in found:
        raise CellError(found["problem"])
    return found


CELLS: dict[str, Callable[..., dict[str, Any]]] = {
    "memory": measure_memory,
    "speed": measure_speed,
    "quality": measure_quality,
    "tasks": measure_tasks,
}


def answer(kind: str, request: dict[str, Any]) -> dict[str, Any]:
    """Return the result of a measurement; if it fails, return a dict whose `problem` says why in one line."""
    try:
        models = {role: Subject.of(request[role]) for role in ("model", "baseline") if request.get(role) is not None}
        return CELLS[kind](**{**request, **models})
    except Exception as error:  # The libraries raise errors of many types; HQQ, for example, asserts.
        problem = " ".join(str(error).split()) if isinstance(error, MLAError) else first_line(error)
        return {"problem": OUT_OF_MEMORY if ran_out_of_memory(error) else problem}


def main() -> None:
    """Answer the request on standard input."""
    quiet_libraries()
    asked = json.loads(sys.stdin.read())
    Path(sys.argv[1]).write_text(json.dumps(answer(asked["kind"], asked["request"])), encoding="utf-8")


if __name__ == "__main__":
    main()
