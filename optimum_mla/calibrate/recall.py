"""Calibration windows that repeat themselves, so that the attention that copies from far back counts."""

from __future__ import annotations

from torch import Tensor

DEFAULT_REPEATS = 3
"""Number of windows of which one repeats itself."""
PERIODS = (1 / 2, 1 / 4, 3 / 4)
"""Distances at which windows repeat themselves, in turn, as shares of their length."""


def with_repeats(windows: Tensor, every: int, start: int = 0) -> Tensor:
    """Return windows [N, L] of which every so-many-th one repeats itself.

    In ordinary text, hardly any token asks for exact words of long ago. So the heads that copy them seem to need little
    and are left little: then passages are no longer copied, while the perplexity hardly shows it. In a window that
    repeats itself, each token is the one that stands a period before it; the periods are `PERIODS` in turn.

    Args:
        windows: Token ids.
        every: Number of windows of which the last one repeats itself; 0 for none.
        start: Number of first tokens, such as BOS, that are not repeated.
    """
    windows = windows.clone()
    chosen = range(every - 1, len(windows), every) if every else ()
    for number, index in enumerate(chosen):
        window = windows[index, start:]
        period = max(1, int(PERIODS[number % len(PERIODS)] * len(window)))
        for place in range(period, len(window), period):
            window[place : place + period] = window[: min(period, len(window) - place)]
    return windows
