"""The progress of long work: a bar on a terminal, and a line now and then where standard error is a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

DELAY_SECONDS = 2.0
"""Work that takes less time shows no bar."""
LINE_SECONDS = 30.0
"""Seconds between two lines where there is no terminal."""


def progress(items: Iterable[T], description: str) -> Iterable[T]:
    """Iterate over items and show how far the work is.

    On a terminal there is a progress bar once the work has taken over two seconds. Elsewhere, as in a log file, a line
    on standard error says every half minute what has been done.

    Args:
        items: What to iterate over.
        description: A few words on the work.
    """
    total = len(items) if isinstance(items, Sized) else None
    if sys.stderr.isatty():
        return tqdm(items, desc=description, total=total, delay=DELAY_SECONDS, leave=False)
    return _with_lines(items, description, total)


def _with_lines(items: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    start = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - last >= LINE_SECONDS:
            last = now
            amount = f"{done:,}" if total is None else f"{done:,} of {total:,}"
            print(f"{description}: {amount}, {now - start:.0f} s", file=sys.stderr, flush=True)
        yield item
