"""Schedules of the learning rate, as fields of `TrainingArguments`."""

from __future__ import annotations

from typing import Any

MHA2MLA_SCHEDULE = "mha2mla"
DECAY_SHARE = 0.1
"""Share of the steps over which the learning rate of `mha2mla` decays."""


def scheduler_arguments(name: str, total_steps: int) -> dict[str, Any]:
    """Return the fields of `TrainingArguments` for a named schedule.

    `mha2mla` is the schedule of MHA2MLA: linear warmup, constant, and 1 - sqrt decay over the last tenth (arXiv
    2502.14837, section 4.1). Any other name is passed to Transformers.

    Args:
        name: `mha2mla` or a `transformers.SchedulerType`.
        total_steps: Number of optimizer steps of the training.
    """
    if name != MHA2MLA_SCHEDULE:
        return {"lr_scheduler_type": name}
    decay = {"num_decay_steps": max(1, round(DECAY_SHARE * total_steps)), "decay_type": "1-sqrt"}
    return {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": decay}
