"""The progress of long work: a bar on a terminal, and a line now and then where standard error is a file."""

from __future__ import annotations

import os
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


def progress(items: Iterable[T], description: str, main: bool = False) -> Iterable[T]:
    """Iterate over items and show how far the work is, and how long the rest should take.

    On a terminal there is a progress bar once the work has taken over two seconds. Elsewhere, as in a log file, lines
    on standard error say what has been done: every half minute, or after each item of the main work of a command, and
    at its end if there was a line before. Of several processes, only the first one shows anything.

    Args:
        items: What to iterate over.
        description: A few words on the work.
        main: Whether this is the main work of a command. Its bar stays when it is done.
    """
    if int(os.environ.get("RANK", 0)):
        return items
    total = len(items) if isinstance(items, Sized) else None
    if sys.stderr.isatty():
        return tqdm(items, desc=description, total=total, delay=DELAY_SECONDS, leave=main)
    return _with_lines(items, description, total, DELAY_SECONDS if main else LINE_SECONDS)


def _with_lines(items: Iterable[T], description: str, total: int | None, seconds: float) -> Iterator[T]:
    """Yield the items; write a line before an item, and at the end, if the last line is more than `seconds` ago."""
    start = last = time.monotonic()
    done, said = 0, False
    for item in items:
        now = time.monotonic()
        if done and now - last >= seconds:
            last, said = now, True
            print(f"{description}: {_state(done, total, now - start)}", file=sys.stderr, flush=True)
        yield item
        done += 1
    if said:
        print(f"{description}: {_count(done, total)}, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


def _count(done: int, total: int | None) -> str:
    return f"{done:,}" if total is None else f"{done:,} of {total:,}"


def _state(done: int, total: int | None, seconds: float) -> str:
    """Return what is done, for how long it took, and how long the rest takes at this pace."""
    text = f"{_count(done, total)}, {seconds:.0f} s"
    if total is None:
        return text
    return f"{text}, about {seconds / done * (total - done):.0f} s left"
