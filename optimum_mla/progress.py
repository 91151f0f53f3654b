"""The progress bar of this package, which is shown on a terminal only."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sized
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

DELAY_SECONDS = 2.0
"""Work that takes less time shows no bar."""


def progress(items: Iterable[T], description: str) -> Iterable[T]:
    """Iterate over items, with a progress bar if standard error is a terminal and the work takes over two seconds."""
    total = len(items) if isinstance(items, Sized) else None
    return tqdm(items, desc=description, total=total, delay=DELAY_SECONDS, leave=False, disable=not sys.stderr.isatty())
