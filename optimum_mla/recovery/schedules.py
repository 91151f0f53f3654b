"""Learning rates over a training, as Transformers' own schedulers."""

from __future__ import annotations

from typing import Any

MHA2MLA_SCHEDULE = "mha2mla"
DECAY_SHARE = 0.1


def scheduler_arguments(name: str, total_steps: int) -> dict[str, Any]:
    """Fields of `TrainingArguments` for a named schedule.

    `mha2mla` is that paper's: linear warmup, constant, and 1 - sqrt decay over the last tenth (arXiv 2502.14837,
    section 4.1). Any other name is Transformers' own.

    Args:
        name: `mha2mla` or a `transformers.SchedulerType`.
        total_steps: Optimizer steps of the training.
    """
    if name != MHA2MLA_SCHEDULE:
        return {"lr_scheduler_type": name}
    decay = {"num_decay_steps": max(1, round(DECAY_SHARE * total_steps)), "decay_type": "1-sqrt"}
    return {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": decay}
