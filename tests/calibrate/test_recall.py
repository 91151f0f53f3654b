"""Windows that repeat themselves: which ones, at which distance, and that nothing else changes."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_mla.calibrate import with_repeats
from optimum_mla.calibrate.recall import PERIODS


@given(st.integers(1, 12), st.integers(2, 40), st.integers(0, 5), st.integers(0, 3))
def test_chosen_windows_repeat_with_their_period(count: int, length: int, every: int, start: int) -> None:
    start = min(start, length - 1)
    windows = torch.arange(count * length).view(count, length)
    given_before = windows.clone()
    found = with_repeats(windows, every, start)
    assert torch.equal(windows, given_before)
    repeated = 0
    for index in range(count):
        if not every or (index + 1) % every:
            assert torch.equal(found[index], windows[index])
            continue
        body, own = found[index, start:], windows[index, start:]
        period = max(1, int(PERIODS[repeated % len(PERIODS)] * len(body)))
        repeated += 1
        assert torch.equal(found[index, :start], windows[index, :start])
        assert torch.equal(body[:period], own[:period])
        assert torch.equal(body[period:], body[:-period] if period < len(body) else body[:0])
    assert repeated == (count // every if every else 0)


def test_the_first_tokens_stay_alone() -> None:
    window = torch.tensor([[1, 10, 11, 12, 13, 14, 15, 16, 17]])
    assert with_repeats(window, 1, start=1).tolist() == [[1, 10, 11, 12, 13, 10, 11, 12, 13]]
