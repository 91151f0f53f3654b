"""The queries, keys and values of a source model's attention, in one form for all families.

Whatever a family does, here every head has D dims, dim i turns with dim i + D/2, and logits are products times D^-½.
A family's own order of dims, its packing of projections, the gain of its norms and its factor on the logits become part
of the weights that this module returns. So nothing after it knows families.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from optimum_mla.core.errors import UnsupportedModelError
from optimum_mla.core.geometry import MLAGeometry
from optimum_mla.families.spec import AttentionSpec, layer_type, norm_eps
from optimum_mla.nn.norm import NORM_EPS
from optimum_mla.ops.rotary import PairTable
from optimum_mla.stack import attention_scaling, rotary_dims


class Heads(NamedTuple):
    """Heads of some tokens before their rotation.

    Attributes:
        query: Queries after their norm, [B, H, S, D].
        key: Keys after their norm, [B, G, S, D].
        value: Values, [B, G, S, D].
        key_factor: Factor by which the key norm multiplies each key, [B, G, S]; ones without a key norm.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    key_factor: Tensor


@dataclass(eq=False)
class SourceAttention:
    """The weights of a source model's attention in float64, split by heads.

    H is the number of query heads, G the number of key and value heads, D the head dim and d the hidden size. A weight
    is cast when it is first read, and the object keeps the float64 copy. So an object should not live longer than the
    work on its layer.

    Attributes:
        spec: The description of the family.
        module: The attention module of the source model.
        geometry: The shape of the layer.
        pairs: How the model's tables of cos and sin are read in this layer.
        input_gain: The gain of the norm before the attention, [d].
        rotary_dims: Number of dims of a head that the model rotates; 0 for all.
        eps: What the norms of queries and keys add to the mean square.
    """

    spec: AttentionSpec
    module: nn.Module
    geometry: MLAGeometry
    pairs: PairTable
    input_gain: Tensor
    rotary_dims: int = 0
    eps: float = NORM_EPS

    def __post_init__(self) -> None:
        self.rotary_dims = self.rotary_dims or self.geometry.head_dim
        self._weights: dict[str, Tensor] = {}

    @property
    def attention_scaling(self) -> float:
        """Return the attention factor of the rotary embedding, by which it multiplies queries and keys."""
        return self.pairs.scaling if self.pairs.rotates else 1.0

    @cached_property
    def order(self) -> Tensor | None:
        """Return the family's dim at each place of a head, [D], or None where the order is the same."""
        return self.pairs.order(self.rotary_dims)

    @cached_property
    def query_factor(self) -> Tensor | None:
        """Return what the dims of the queries are multiplied by, [D], or None for ones.

        It makes up for the family's factor on the logits, which is D^-½ here, and for pairs that stand still in a head
        of which others turn: their cosine is the attention factor instead of 1.
        """
        g = self.geometry
        usual = g.head_dim**-0.5
        scale = float(getattr(self.module, "scaling", None) or usual)
        factor = torch.full((g.head_dim,), scale / usual, dtype=torch.float64)
        if self.pairs.rotates:
            still = torch.arange(g.head_dim) % (g.head_dim // 2) >= self.rotary_dims // 2
            factor[still] /= self.pairs.scaling**2
        return None if (factor == 1).all() else factor

    def _in_order(self, heads: Tensor) -> Tensor:
        """Return heads [X, D, ...] with their dims in the order of this package."""
        return heads if self.order is None else heads[:, self.order.to(heads.device)]

    def _linear(self, name: str) -> nn.Linear:
        return self.module.get_submodule(name)  # type: ignore[return-value]

    def _tensor(self, part: str, tensor: str) -> Tensor | None:
        """Return the weight or the bias of the query, key or value projection, [heads, D, ...], or None."""
        spec, g = self.spec, self.geometry
        found = getattr(self._linear(spec.fused or getattr(spec, part)), tensor)
        if found is None:
            return None
        heads = found.detach().unflatten(0, (-1, g.head_dim))
        if spec.fused is None:
            return heads
        place = ("query", "key", "value").index(part)
        if spec.fused_by_head:
            return heads[place::3]
        return heads.split([g.num_attention_heads, g.num_key_value_heads, g.num_key_value_heads])[place]

    def _heads(self, part: str, tensor: str) -> Tensor:
        """Return the weight or bias of a projection in float64, which is zero if the projection has no bias."""
        name = f"{part}.{tensor}"
        if name not in self._weights:
            found = self._tensor(part, tensor)
            if found is None:
                found = torch.zeros_like(self._heads(part, "weight")[..., 0])
            elif part != "value":
                found = self._in_order(found)
            found = found.double()
            if part == "query" and self.spec.query_norm is None and self.query_factor is not None:
                # With a query norm the factor is part of the norm's gain.
                factor = self.query_factor.to(found.device)
                found = found * (factor if tensor == "bias" else factor[:, None])
            self._weights[name] = found
        return self._weights[name]

    @property
    def query(self) -> Tensor:
        """Return the query weight W_Q, [H, D, d]."""
        return self._heads("query", "weight")

    @property
    def key(self) -> Tensor:
        """Return the key weight W_K, [G, D, d]."""
        return self._heads("key", "weight")

    @property
    def gained_key(self) -> Tensor:
        """Return the key weight W_K times the gain of the key norm, [G, D, d].

        With a key norm, a key is this weight times the state, divided by the root mean square of the unnormed key.
        """
        return self.key * self.key_gain[..., None]

    @property
    def gained_key_bias(self) -> Tensor:
        """Return the key bias times the gain of the key norm, [G, D]."""
        return self.key_bias * self.key_gain

    @property
    def value(self) -> Tensor:
        """Return the value weight W_V, [G, D, d]."""
        return self._heads("value", "weight")

    @property
    def query_bias(self) -> Tensor:
        """Return the query bias, [H, D], which is zero if the projection has none."""
        return self._heads("query", "bias")

    @property
    def key_bias(self) -> Tensor:
        """Return the key bias, [G, D], which is zero if the projection has none."""
        return self._heads("key", "bias")

    @property
    def value_bias(self) -> Tensor:
        """Return the value bias, [G, D], which is zero if the projection has none."""
        return self._heads("value", "bias")

    @property
    def query_gain(self) -> Tensor:
        """Return the gain of the query norm, [1, D], or [H, D] for a norm over all heads; ones without a norm."""
        gain = self._gain(self.spec.query_norm)
        if self.spec.query_norm is None or self.query_factor is None:
            return gain
        return gain * self.query_factor.to(gain.device)

    @property
    def key_gain(self) -> Tensor:
        """Return the gain of the key norm, [1, D], or [G, D] for a norm over all heads; ones without a norm."""
        return self._gain(self.spec.key_norm)

    def _gain(self, name: str | None) -> Tensor:
        head_dim = self.geometry.head_dim
        if name is None:
            device = next(self.module.parameters()).device
            return torch.ones(1, head_dim, dtype=torch.float64, device=device)
        weight: Any = self.module.get_submodule(name).weight
        return self._in_order(weight.detach().double().unflatten(0, (-1, head_dim))) + self.spec.norm_offset

    def project(self, states: Tensor) -> Heads:
        """Return the heads of some tokens.

        Args:
            states: Inputs of the attention, after the norm before it, [B, S, d]. Heads have their dtype.
        """

        def heads(part: str) -> Tensor:
            weight, bias = (self._heads(part, name).to(states.dtype) for name in ("weight", "bias"))
            flat = nn.functional.linear(states, weight.flatten(0, 1), bias.flatten())
            return flat.unflatten(-1, weight.shape[:2]).transpose(1, 2)

        query, key, value = heads("query"), heads("key"), heads("value")
        factor = torch.ones_like(key[..., 0])
        if self.spec.query_norm is not None:
            query = query * self._norm_factor(query) * self.query_gain.to(query.dtype)[:, None]
        if self.spec.key_norm is not None:
            factor = self._norm_factor(key)
            key = key * factor * self.key_gain.to(key.dtype)[:, None]
            factor = factor[..., 0].expand(key.shape[:-1])
        return Heads(query, key, value, factor)

    def _norm_factor(self, heads: Tensor) -> Tensor:
        """Return what a norm multiplies heads [B, X, S, D] by before its gain, [B, X or 1, S, 1]."""
        dims = (1, 3) if self.spec.joint_norms else (3,)
        return heads.square().mean(dims, keepdim=True).add(self.eps).rsqrt()

    def output(self) -> dict[str, Tensor]:
        """Return the parameters of the output projection as `o_proj.weight` and, if it has one, `o_proj.bias`.

        They keep the dtype of the model.
        """
        return {f"o_proj.{name}": value.detach() for name, value in self._linear(self.spec.output).named_parameters()}

    def biased(self, part: str) -> bool:
        """Return whether the `query`, `key`, `value` or `output` projection has a bias."""
        name = getattr(self.spec, part) if part == "output" or self.spec.fused is None else self.spec.fused
        return self._linear(name).bias is not None


def pair_table(spec: AttentionSpec, config: Any, layer: int, rotary: Any) -> PairTable:
    """Return how the tables of a model's rotary embedding are read in a layer."""
    return PairTable(
        head_dim=spec.geometry(config.per_layer_config[layer]).head_dim,
        interleaved=spec.interleaved,
        repeated=spec.interleaved_table,
        rotates=spec.rotates(config, layer),
        scaling=attention_scaling(rotary, layer_type(config, layer)),
    )


def source_attention(
    spec: AttentionSpec, decoder_layer: nn.Module, config: Any, layer: int, rotary: Any
) -> SourceAttention:
    """Return the source attention of one layer of a model, whose rotary embedding is `rotary`.

    Raises:
        UnsupportedModelError: A projection is not an `nn.Linear`, the attention has sinks, or the spec names a module
            that the model lacks.
    """
    module = spec.part(decoder_layer, spec.attention, layer)
    for name in spec.projections:
        kind = type(spec.part(module, name, layer))
        if kind is not nn.Linear:
            raise UnsupportedModelError(
                f"model: {spec.attention_path(layer)}.{name} is no plain linear layer but "
                f"{kind.__module__}.{kind.__qualname__}. Merge adapters and undo quantization first."
            )
    geometry = spec.geometry(config.per_layer_config[layer])
    if spec.input_norm is None:
        gain = torch.ones(geometry.hidden_size, device=next(module.parameters()).device)
    else:
        gain = spec.part(decoder_layer, f"{spec.input_norm}.weight", layer).detach() + spec.norm_offset
    turned = rotary_dims(rotary, layer_type(config, layer), geometry.head_dim)
    pairs = pair_table(spec, config, layer, rotary)
    return SourceAttention(spec, module, geometry, pairs, gain, turned, norm_eps(config))
