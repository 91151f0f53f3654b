"""The time and the memory of the stages of a conversion."""

from __future__ import annotations

import time

import torch

from optimum_mla.measure.stages import Stages


def test_a_stage_has_its_own_time_and_peak() -> None:
    stages = Stages()
    with stages.stage("large"):
        held = torch.ones(50_000_000)  # 200 MB
        time.sleep(0.05)
    del held
    with stages.stage("small"):
        pass
    with stages.stage("large"):
        time.sleep(0.05)
    assert [stage.name for stage in stages.done] == ["small", "large"]
    small, large = stages.done
    assert large.seconds >= 0.1 > small.seconds
    assert stages.peak() >= 200e6
    if small.peak_bytes is not None and large.peak_bytes is not None:
        assert large.peak_bytes - small.peak_bytes > 100e6
