"""How much the model's predictions change if the attention of one layer at a time is replaced."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from optimum_mla.calibrate.perplexity import head_parts
from optimum_mla.calibrate.walk import CalibrationWalk

SENSITIVITY_TOKENS = 2048
"""Number of tokens whose predictions are compared, rounded down to whole windows, of which there is one at least. All
layers after a replaced one compute them again, so that the work grows with the square of the number of layers."""
STREAM_NUMBERS = 2**28
"""Largest number of numbers in the streams of all layers together; there are fewer tokens where they would be more."""
TOKENS_AT_ONCE = 256
"""Number of tokens whose predictions are computed at once."""


class Sensitivity:
    """Carries, beside a walk over the source, one stream of states for each layer whose attention was replaced.

    Errors of different layers add up in the divergence, so the share that each layer has in it says where bytes are
    worth most. Errors in the hidden state do not: later layers make much of some of them and nothing of others.

    Args:
        walk: A walk in which no layer is converted.
    """

    def __init__(self, walk: CalibrationWalk) -> None:
        self._walk = walk
        room = STREAM_NUMBERS // (walk.model.num_layers * walk.source.shape[-1])
        self._windows = min(len(walk.windows), max(1, min(SENSITIVITY_TOKENS, room) // walk.windows.shape[1]))
        self._streams: dict[int, Tensor] = {}

    def replace(self, attention: nn.Module) -> None:
        """Start a stream in which the layer before which the walk stands has another attention."""
        walk = self._walk
        self._streams[walk.layer] = walk.through(walk.with_attention(attention), walk.source[: self._windows])

    def advance(self) -> None:
        """Carry the walk, and the streams of earlier layers, through the layer before which the walk stands."""
        walk = self._walk
        for layer, states in self._streams.items():
            if layer != walk.layer:
                self._streams[layer] = walk.through(walk.decoder_layer, states)
        walk.advance()

    def divergences(self, title: str) -> dict[int, float]:
        """Return the mean divergence of the predictions from the source's in nats, by the replaced layer.

        It is KL(source, replaced). The walk is carried to the end for it.

        Args:
            title: What the progress of this is called.
        """
        walk = self._walk
        while walk.layer < walk.model.num_layers:
            self.advance()
        norm, head = walk.model.final_norm().to(walk.dtype), walk.model.head()
        logits = partial(walk.model.family.spec.logits, walk.model.config)

        def predicted(states: Tensor) -> Tensor:
            return logits(torch.cat([*head_parts(norm(states), head)], dim=-1)).log_softmax(-1)

        def sums(part: tuple[Tensor, ...]) -> tuple[float, ...]:
            expected = predicted(part[0])
            offs = (expected - predicted(states) for states in part[1:])
            return tuple(float((expected.exp() * off).sum(-1).double().sum()) for off in offs)

        streams = [states[: self._windows].flatten(0, 1) for states in (walk.source, *self._streams.values())]
        parts = list(zip(*(stream.split(TOKENS_AT_ONCE) for stream in streams), strict=True))
        totals = walk.processes.summed(parts, sums, title)
        # Rounding may leave less than nothing.
        return {layer: max(0.0, total / len(streams[0])) for layer, total in zip(self._streams, totals, strict=True)}
