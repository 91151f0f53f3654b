"""A callback that stops a training whose loss diverges, before a good checkpoint is overwritten."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback

DIVERGED_NATS = 2.0
"""A loss that is more than this above the first logged one counts as diverged."""


class DivergenceGuard(TrainerCallback):
    """Ends training when a logged loss is not finite or far above the first one.

    The loss of the first step is always logged on its own. It was computed before any update, so it cannot have
    diverged, whereas a mean over several steps may contain losses that have. A checkpoint is saved only after the loss
    of its step was logged and checked.

    Attributes:
        diverged_at: Step at which the loss had diverged, or None.
        value: The loss at that step.
    """

    def __init__(self) -> None:
        self.first: float | None = None
        self.diverged_at: int | None = None
        self.value = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Log the loss at the first step, and at every step at which a checkpoint is due."""
        if control.should_save or state.global_step == 1:
            control.should_log = True
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        """Stop the training if the logged loss has diverged."""
        loss = (logs or {}).get("loss")
        if loss is None:
            return control
        if self.first is None and math.isfinite(loss):
            self.first = next((entry["loss"] for entry in state.log_history if "loss" in entry), loss)
        if self.first is None or not math.isfinite(loss) or loss > self.first + DIVERGED_NATS:
            self.diverged_at, self.value = state.global_step, loss
            control.should_training_stop = True
            control.should_evaluate = control.should_save = False
        return control
