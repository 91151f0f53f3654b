"""Held-out text during a training: its loss at every checkpoint says which step is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import Trainer, TrainerCallback


@dataclass(frozen=True)
class HeldOut:
    """Text that a training is measured on, and does not train on.

    Attributes:
        windows: Its token ids, [N, L].
        loss: Returns the mean loss of a model on the windows, in nats a token.
        start: This loss before the training. Only the first process needs to know it.
    """

    windows: Tensor
    loss: Callable[[Any], float]
    start: float | None


class HeldOutTrainer(Trainer):
    """A `Trainer` that evaluates by the loss of held-out text, whatever it trains towards.

    The model as it was given is the first candidate for the best step, as step 0. Without held-out text this is
    Transformers' own trainer.

    Args:
        held_out: The text, or None.
        options: Keyword arguments of `Trainer`.
    """

    control: Any

    def __init__(self, *args: Any, held_out: HeldOut | None = None, **options: Any) -> None:
        if held_out is not None:
            options.setdefault("eval_dataset", held_out.windows)
        super().__init__(*args, **options)
        self.held_out = held_out
        if held_out is not None:
            self.add_callback(StartCounts(held_out.start))

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return the loss of the held-out text as `eval_loss`, and log it, as `Trainer` does.

        The loss of the first process counts for all, so that they agree on the best step.
        """
        if self.held_out is None:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        whole = self.model_wrapped if self.is_fsdp_enabled or self.is_deepspeed_enabled else self.model
        (loss,) = broadcast_object_list([self.held_out.loss(whole)])
        metrics = {f"{metric_key_prefix}_loss": loss}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class StartCounts(TrainerCallback):
    """Makes the model as it was given the best one so far, as step 0, when a training begins.

    Its loss on the held-out text is that of the first process for all.
    """

    def __init__(self, loss: float | None) -> None:
        self.loss = loss

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the best loss, unless the training goes on from a checkpoint, which knows it."""
        if state.best_metric is None:
            (state.best_metric,) = broadcast_object_list([self.loss])
            state.best_global_step = 0
