"""How much the model's predictions change if the attention of one layer at a time is replaced."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from optimum_mla.calibrate.perplexity import head_parts
from optimum_mla.calibrate.walk import CalibrationWalk
from optimum_mla.core.progress import progress

SENSITIVITY_TOKENS = 2048
"""Number of tokens whose predictions are compared, rounded down to whole windows, of which there is one at least. All
layers behind a replaced one compute them again, so that the work grows with the square of the number of layers."""
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

        found = dict.fromkeys(self._streams, 0.0)
        pieces = {layer: stream.flatten(0, 1).split(TOKENS_AT_ONCE) for layer, stream in self._streams.items()}
        source = walk.source[: self._windows].flatten(0, 1)
        parts = source.split(TOKENS_AT_ONCE)
        for number in progress(walk.processes.share(torch.arange(len(parts))).tolist(), title, main=True):
            expected = predicted(parts[number])
            weights = expected.exp()
            for layer in found:
                off = expected - predicted(pieces[layer][number])
                found[layer] += float((weights * off).sum(-1).double().sum()) / len(source)
        totals = walk.processes.total(*found.values())
        return {layer: max(0.0, total) for layer, total in zip(found, totals, strict=True)}  # Rounding may leave less.
