"""A journal that says what a long run has done, so that a later run can go on after it."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from optimum_mla.io.folder import as_output_error

logger = logging.getLogger(__name__)


class Journal:
    """A file with one line of JSON for each thing that a run has done.

    A line is on the disk once `add` returns. A line may still be damaged: the last one is cut off if the process or the
    machine died while it was written, and file systems leave NUL bytes after a loss of power. Lines are read up to the
    first one that is damaged. That one and what comes after it are cut off the file, which a warning says.

    Args:
        path: The file, which need not exist.

    Attributes:
        path: The file.
        entries: What the lines say, by their keys.

    Raises:
        OutputError: The file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Any] = {}
        whole = 0
        with as_output_error(path):
            lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
            for number, line in enumerate(lines, 1):
                try:
                    entry: Any = json.loads(line) if line.endswith(b"\n") else None
                    self.entries[entry["key"]] = entry["value"]
                except (ValueError, KeyError, TypeError, RecursionError):
                    said = "warning: %s is damaged from line %d on. What it said from there on is done again."
                    logger.warning(said, path, number)
                    os.truncate(path, whole)
                    break
                whole += len(line)

    def add(self, key: str, value: Any) -> None:
        """Write a line, and return when it is on the disk.

        Args:
            key: What the line is about, in a few words.
            value: What `as_json` takes; numbers come back as they are.

        Raises:
            OutputError: The file cannot be written.
        """
        kept = as_json(value)
        with as_output_error(self.path), self.path.open("ab") as file:
            file.write(json.dumps({"key": key, "value": kept}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.entries[key] = kept


def as_json(value: Any) -> Any:
    """Return a value as it comes back from a file of JSON.

    Tuples become lists there, keys become text, and so does everything that JSON has no form for, such as a path or a
    dtype.
    """
    return json.loads(json.dumps(value, default=str))


def differing_names(kept: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """Return the names, in order, whose values differ between what was kept of a run and what is given now.

    What JSON makes of the values is compared, so that a tuple equals the list that was kept of it, and NaN equals NaN.

    Args:
        kept: What came back from a file of JSON.
        given: Values of any types.
    """
    there, here = (json.loads(json.dumps(values, default=str), parse_constant=str) for values in (kept, given))
    return [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
