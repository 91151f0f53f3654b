"""A journal that says what a long run has done, so that a later run can go on after it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Journal:
    """A file with one line of JSON for each thing that a run has done.

    A line is on the disk once `add` returns. A last line that was cut off, because the process or the machine died
    while it was written, is dropped.

    Args:
        path: The file, which need not exist.

    Attributes:
        entries: What the lines say, by their keys.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Any] = {}
        written = path.read_bytes() if path.exists() else b""
        whole = written[: written.rfind(b"\n") + 1]
        for line in whole.splitlines():
            entry = json.loads(line)
            self.entries[entry["key"]] = entry["value"]
        if len(whole) < len(written):
            os.truncate(path, len(whole))

    def add(self, key: str, value: Any) -> None:
        """Write a line, and return when it is on the disk.

        Args:
            key: What the line is about, in a few words.
            value: What JSON can hold; numbers come back as they are.
        """
        with self.path.open("ab") as file:
            file.write(json.dumps({"key": key, "value": value}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.entries[key] = json.loads(json.dumps(value))
