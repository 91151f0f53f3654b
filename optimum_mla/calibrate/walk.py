"""A walk through the layers of a model that carries the hidden states of the source and of the converted model.

At each layer, conversions measure on these states (`optimum_mla.calibrate.layer`). The only activations
that the walk keeps are the hidden states of the calibration tokens, [N, L, d] in float32 for each of the two models, so
its memory does not grow with the number of layers. One layer at a time is copied to float32, or to float64 if the model
is in float64. N is the number of windows and L the number of tokens in each.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optimum_mla.families.spec import AttentionSpec, sliding_window

TOKENS_PER_BATCH = 4096
"""Number of tokens that go through a layer in one batch."""


@dataclass(frozen=True)
class _Block:
    """The parts of a decoder layer that computes h + attention(input_norm(h)) and then h + mlp(mlp_norm(h))."""

    input_norm: nn.Module
    attention: nn.Module
    mlp_norm: nn.Module
    mlp: nn.Module


class CalibrationWalk:
    """Carries the hidden states of the calibration tokens from layer to layer.

    Args:
        model: A model or a traced one. It is not changed.
        spec: The description of the model's family.
        config: The model's config.
        windows: Token ids, [N, L].
    """

    def __init__(self, model: nn.Module, spec: AttentionSpec, config: Any, windows: Tensor) -> None:
        self.model, self.config, self._spec = model, config, spec
        embedding = model.get_submodule(f"{spec.base}.{spec.embedding}")
        weight = next(embedding.parameters())
        self.device, self.dtype = weight.device, torch.promote_types(weight.dtype, torch.float32)
        self.source = embedding(windows.to(self.device)).to(self.dtype)
        self.converted = self.source
        length = windows.shape[1]
        # The rotary embedding is copied, because one that depends on the length remembers the longest pass.
        rotary = copy.deepcopy(model.get_submodule(spec.rotary_path))
        self.position_embeddings = rotary(self.source[:1], torch.arange(length, device=self.device)[None])
        self._layer, self.middle = -1, self.source
        self._block: _Block | None = None
        self._enter(0)

    @property
    def layer(self) -> int:
        """Return the index of the layer whose inputs the states are."""
        return self._layer

    def _enter(self, layer: int) -> None:
        """Copy the layer to the walk's dtype and compute the source's states after its attention."""
        self._layer = layer
        if layer == self.config.num_hidden_layers:
            return
        spec, path = self._spec, self._spec.layer_path(layer)
        names = (spec.input_norm, spec.attention, spec.mlp_norm, spec.mlp)
        self._block = _Block(*(_working_copy(self.model.get_submodule(f"{path}.{name}"), self.dtype) for name in names))
        window = sliding_window(self.config, layer)
        self.windowed, self.mask = window is not None, self._mask(window)
        self.middle = self.source + torch.cat(list(self.outputs(self._block.attention, self.source)))

    def _mask(self, window: int | None) -> Tensor:
        """Return a mask that is True where a token attends to another, [1, 1, L, L].

        Args:
            window: Length of the sliding window in tokens, or None for full attention.
        """
        length = self.source.shape[1]
        rows = torch.arange(length, device=self.device)
        distance = rows[:, None] - rows
        seen = distance >= 0
        return (seen if window is None else seen & (distance < window))[None, None]

    @property
    def block(self) -> _Block:
        """Return the copied parts of the layer whose inputs the states are.

        Raises:
            RuntimeError: The walk has passed the last layer.
        """
        if self._block is None:
            raise RuntimeError("the walk has no layer left")
        return self._block

    def batches(self, states: Tensor) -> tuple[Tensor, ...]:
        """Return states [N, L, ...] split along N into batches of at most `TOKENS_PER_BATCH` tokens, or one window."""
        return states.split(max(1, TOKENS_PER_BATCH // states.shape[1]))

    @property
    def row_weights(self) -> Tensor:
        """Return one over the mean square of the source's state after the attention at each token, [N, L].

        Every squared error is multiplied by it. The norms of later layers divide by the same size, and otherwise a few
        tokens with huge hidden states would dominate every measurement.
        """
        return self.middle.square().mean(-1).clamp_min(torch.finfo(torch.float32).tiny).reciprocal()

    def outputs(self, attention: nn.Module, states: Tensor) -> Iterator[Tensor]:
        """Yield the output of an attention for each batch of states, after the norm before the attention."""
        for batch in self.batches(states):
            normed = self.block.input_norm(batch)
            position_ids = torch.arange(batch.shape[1], device=self.device)[None]
            yield attention(
                normed,
                position_embeddings=self.position_embeddings,
                # Without a mask the attention is causal, which is all that full attention needs and is faster.
                attention_mask=self.mask if self.windowed else None,
                position_ids=position_ids,
            )[0]

    def advance(self, attention: nn.Module | None = None) -> None:
        """Carry the hidden states of both models through the layer.

        Args:
            attention: The attention of the converted model in this layer; None takes that of the source.
        """
        unchanged = attention is None and self.converted is self.source
        new = self.block.attention if attention is None else _working_copy(attention, self.dtype)
        if not unchanged:
            middle = self.converted + torch.cat(list(self.outputs(new, self.converted)))
            self.converted = self._mlp(middle)
        self.source = self._mlp(self.middle)
        if unchanged:
            self.converted = self.source
        self._enter(self._layer + 1)

    def _mlp(self, states: Tensor) -> Tensor:
        block = self.block
        return torch.cat([batch + block.mlp(block.mlp_norm(batch)) for batch in self.batches(states)])


def _working_copy(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy of a module in evaluation mode, with `sdpa` attention, which is causal if it gets no mask."""
    clone = copy.deepcopy(module).to(dtype).eval()
    config = getattr(clone, "config", None)
    if config is not None:
        config = copy.copy(config)
        config._attn_implementation = "sdpa"  # type: ignore[union-attr]
        clone.config = config
    return clone
