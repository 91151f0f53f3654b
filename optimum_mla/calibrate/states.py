"""The heads and the attention weights of a layer of the source model on the states of a calibration walk."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from optimum_mla.calibrate.walk import CalibrationWalk
from optimum_mla.families.project import SourceAttention
from optimum_mla.ops.blockwise import capped
from optimum_mla.ops.rotary import Rotation, rotate


class HeadStates(NamedTuple):
    """The states of the heads of one batch of windows.

    Attributes:
        normed: Inputs of the attention, after the norm before it, [B, L, d].
        query: Queries after their norm and before their rotation, [B, H, L, D].
        key: Keys after their norm and before their rotation, [B, G, L, D].
        value: Values, [B, G, L, D].
        key_factor: Factor by which the key norm multiplies each key, [B, G, L]; ones without a key norm.
    """

    normed: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    key_factor: Tensor


class LayerStates:
    """Computes the heads of the layer that a walk stands before, and what its attention does with them.

    Args:
        walk: The walk, whose states are the inputs of the layer.
        source: The layer's attention.
    """

    def __init__(self, walk: CalibrationWalk, source: SourceAttention) -> None:
        self.walk, self.source, self.geometry = walk, source, source.geometry

    @cached_property
    def row_weights(self) -> Tensor:
        """Return the weight of each token's squared error, [N, L]; see `CalibrationWalk.row_weights`."""
        return self.walk.row_weights

    @cached_property
    def relative_weights(self) -> Tensor:
        """Return the row weights divided by their mean, [N, L]; zeros where all of them are zero."""
        return self.row_weights / (self.row_weights.mean() or 1.0)

    def heads(self, states: Tensor) -> HeadStates:
        """Return the heads on hidden states before the layer, [B, L, d]."""
        normed = self.walk.input_norm(states)
        return HeadStates(normed, *self.source.project(normed))

    @property
    def cos_sin(self) -> tuple[Tensor, Tensor]:
        """Return cos and sin of all pairs at the positions of a window, [1, L, D/2] each."""
        return self.source.pairs.cos_sin(self.walk.position_embeddings)

    def weights(self, query: Tensor, key: Tensor) -> Tensor:
        """Return the attention weights, [B, H, L, L], of queries [B, H, L, D] and keys [B, G, L, D]."""
        rotation = Rotation(*(part.unsqueeze(1) for part in self.cos_sin))
        query, key = rotate(query, rotation), rotate(key, rotation)
        share = query.shape[1] // key.shape[1]
        # The attention factor of the rotary embedding is already part of cos and sin.
        logits = query @ key.repeat_interleave(share, dim=1).mT * self.geometry.head_dim**-0.5
        logits = capped(logits, self.geometry.logit_cap)
        return logits.masked_fill(~self.walk.mask, float("-inf")).softmax(dim=-1)

    @cached_property
    def output_moments(self) -> Tensor:
        """Return W_O,hᵀ W_O,h of every query head h in the walk's dtype, [H, D, D]."""
        return output_moments(self.source).to(self.walk.dtype)

    def value_spread(self, weights: Tensor, value: Tensor) -> Tensor:
        """Return the variance, under each query's attention, of what the values add to the hidden state, [B, H, L].

        Args:
            weights: Attention weights, [B, H, L, L].
            value: Values, [B, G, L, D].
        """
        value = value.repeat_interleave(weights.shape[1] // value.shape[1], dim=1)  # [B, H, L, D]
        size = ((value @ self.output_moments) * value).sum(-1, keepdim=True)
        mean = weights @ value
        mean_size = ((mean @ self.output_moments) * mean).sum(-1)
        return ((weights @ size)[..., 0] - mean_size).clamp_min(0)


def output_moments(source: SourceAttention) -> Tensor:
    """Return W_O,hᵀ W_O,h of every query head h, [H, D, D].

    With it, the error of a value gives the squared size of the error in the hidden state.
    """
    heads = source.output()["o_proj.weight"].double().unflatten(1, (source.geometry.num_attention_heads, -1))
    return torch.einsum("ohd,ohe->hde", heads, heads)
