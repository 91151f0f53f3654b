"""Attention written from the papers' definitions, head by head, with no latent: what a conversion must equal."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class RotatedPair(NamedTuple):
    """Two dims of a head that turn together, at the source's frequency number `frequency`."""

    first: int
    second: int
    frequency: int


class Weights(NamedTuple):
    """What one layer projects with: query [H, D, d], key and value [G, D, d], key bias [G, D].

    A key norm's gain is in the key's weight and bias unless the changed keys are normed anew.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    key_bias: Tensor


def truncated(matrix: Tensor, rank: int) -> Tensor:
    """Best rank-`rank` approximation, by the library's own singular value decomposition."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


class NaiveAttention(nn.Module):
    """Source attention with other weights, in which key head g rotates the pairs `pairs[g]` and nothing else.

    A dim that does not rotate still carries the rotary embedding's attention factor, as the source's logits do.
    """

    def __init__(
        self, source: Any, weights: Weights, pairs: list[list[RotatedPair]], window: int | None, normed_anew: bool
    ) -> None:
        super().__init__()
        self.source, self.weights, self.pairs, self.window = source, weights, pairs, window
        self.normed_anew = normed_anew

    def _project(self, x: Tensor, weight: Tensor, bias: Tensor | None, norm: str) -> Tensor:
        """[S, heads, D], after the family's head norm."""
        heads = torch.einsum("sd,hed->she", x, weight.to(x))
        if bias is not None:
            heads = heads + bias.reshape(heads.shape[1:])
        return getattr(self.source, norm)(heads) if hasattr(self.source, norm) else heads

    def _rotated(self, head: Tensor, pairs: list[RotatedPair], cos: Tensor, sin: Tensor, factor: float) -> Tensor:
        """One head [S, D]."""
        turned = head * factor
        for first, second, frequency in pairs:
            c, s = cos[:, frequency], sin[:, frequency]
            turned[:, first] = head[:, first] * c - head[:, second] * s
            turned[:, second] = head[:, second] * c + head[:, first] * s
        return turned

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any) -> Any:
        """Causal attention without a cache or padding."""
        rows = []
        w, length = self.weights, hidden_states.shape[1]
        key_heads, head_dim = w.key.shape[:2]
        share = w.query.shape[0] // key_heads
        cos, sin = (table[0].to(hidden_states) for table in position_embeddings)
        factor = float((cos[0, 0] ** 2 + sin[0, 0] ** 2).sqrt())
        distance = torch.arange(length)[:, None] - torch.arange(length)[None]
        hidden = (distance < 0) if self.window is None else (distance < 0) | (distance >= self.window)
        for x in hidden_states:
            queries = self._project(x, w.query, self.source.q_proj.bias, "q_norm")
            norm = "k_norm" if self.normed_anew else "no such norm"
            keys = self._project(x, w.key, w.key_bias.to(x), norm)
            if not self.normed_anew and hasattr(
                self.source, "k_norm"
            ):  # by the root mean square of the source's own keys
                own = self.source.k_proj(x).view_as(keys)
                keys = keys * (own.square().mean(-1, keepdim=True) + self.source.k_norm.variance_epsilon).rsqrt()
            values = self._project(x, w.value, self.source.v_proj.bias, "no such norm")
            heads = []
            for head in range(w.query.shape[0]):
                group = head // share
                query = self._rotated(queries[:, head], self.pairs[group], cos, sin, factor)
                key = self._rotated(keys[:, group], self.pairs[group], cos, sin, factor)
                logits = (query @ key.T / head_dim**0.5).masked_fill(hidden, -torch.inf)
                heads.append(logits.softmax(-1) @ values[:, group])
            rows.append(torch.cat(heads, dim=-1))
        return self.source.o_proj(torch.stack(rows)), None


def source_weights(attention: Any, head_dim: int, gained: bool) -> Weights:
    """The source's own weights, split by heads, in float64; `gained` puts a key norm's gain into the keys."""
    query, key, value = (
        getattr(attention, f"{name}_proj").weight.detach().double().unflatten(0, (-1, head_dim)) for name in "qkv"
    )
    bias = attention.k_proj.bias
    key_bias = torch.zeros(key.shape[:2]) if bias is None else bias.detach().view(key.shape[:2])
    gain = (
        attention.k_norm.weight.detach().double()
        if gained and hasattr(attention, "k_norm")
        else torch.ones(head_dim).double()
    )
    return Weights(query, key * gain[:, None], value, key_bias.double() * gain)


def naive_model(
    model: PreTrainedModel,
    change: Callable[[Weights, int], tuple[Weights, list[list[RotatedPair]]]],
    layers: tuple[int, ...] | None = None,
    normed_anew: bool = False,
) -> PreTrainedModel:
    """A copy of `model` whose attention is naive, with the weights and pairs that `change` makes of a layer's.

    A key norm takes the root mean square of the source's keys or, `normed_anew`, of the changed ones.
    """
    model = copy.deepcopy(model)
    for index in range(model.config.num_hidden_layers) if layers is None else layers:
        layer = model.model.layers[index]
        weights = source_weights(layer.self_attn, model.config.head_dim, gained=not normed_anew)
        window = getattr(model.config, "sliding_window", None)
        layer.self_attn = NaiveAttention(layer.self_attn, *change(weights, index), window, normed_anew)
    return model


def whole_pairs(chosen: list[int], head_dim: int) -> list[RotatedPair]:
    """Source pairs by their number, at their own frequency."""
    return [RotatedPair(pair, pair + head_dim // 2, pair) for pair in chosen]
