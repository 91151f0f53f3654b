"""One way to show progress: a bar on a terminal, nothing elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sized
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

DELAY_SECONDS = 2.0
"""Work that is done by then shows no bar."""


def progress(items: Iterable[T], description: str) -> Iterable[T]:
    """Iterate with a progress bar on standard error, if that is a terminal and the work takes over two seconds."""
    total = len(items) if isinstance(items, Sized) else None
    return tqdm(items, desc=description, total=total, delay=DELAY_SECONDS, leave=False, disable=not sys.stderr.isatty())
