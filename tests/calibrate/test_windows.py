"""Which windows of a text calibrate, and which are left to the report."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_mla.calibrate.windows import (
    HELD_BACK,
    REPORTED_WINDOWS,
    deciding,
    deciding_windows,
    split_for_report,
    windows_to_read,
)


@given(st.integers(1, 300), st.integers(1, 400))
def test_no_window_is_both_calibrated_and_reported_on(samples: int, there: int) -> None:
    read = min(there, windows_to_read(samples))
    windows = torch.arange(read)[:, None].expand(-1, 3)
    calibration, left = split_for_report(windows, samples)
    used = set(calibration[:, 0].tolist())
    assert 1 <= len(used) <= samples
    if left is None:
        assert read <= HELD_BACK
        assert used == set(range(min(read, samples)))
        return
    reported = set(left[:, 0].tolist())
    assert 1 <= len(reported) <= REPORTED_WINDOWS
    assert not used & reported
    assert len(used) >= HELD_BACK  # so that some of them can decide
    # A text that is long enough gives as many calibration windows as were asked for.
    if read == windows_to_read(samples):
        assert len(used) == samples
    assert not set(deciding_windows(calibration)[:, 0].tolist()) & reported


def test_the_default_leaves_sixteen_windows_spread_over_the_text() -> None:
    calibration, left = split_for_report(torch.arange(windows_to_read(128))[:, None], 128)
    assert windows_to_read(128) == 144
    assert left is not None
    assert left.flatten().tolist() == list(range(8, 144, 9))
    assert len(calibration) == 128
    assert len(deciding(128)) == 16
