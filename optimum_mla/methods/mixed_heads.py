"""GQA2MLA's decoupled form, which mixes the key heads of each frequency and stops the rotations that matter least."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from optimum_mla.calibrate.calibration import Calibration
from optimum_mla.calibrate.weighting import STOPPED_WEIGHT, key_moments, value_moments
from optimum_mla.core.geometry import MLAGeometry
from optimum_mla.methods.decoupled import latent_gain, latent_tensors
from optimum_mla.methods.factors import LatentFactors
from optimum_mla.models import SourceAttention
from optimum_mla.ops.rope_mix import mixed_keys, query_map
from optimum_mla.ops.shared_rope import SharedRope
from optimum_mla.ops.weighted import WeightedFactorization, WeightedRows


class MixedHeads:
    """The C = G·D/2 complex components of one layer's keys, which result from mixing the key heads of each frequency.

    A query head reads the shared rotary key through R linear combinations of its own dims. It reads the components that
    do not rotate as a position-free key of D dims, into which they are mapped back for its key head.

    Args:
        source: The layer's attention.
        calibration: Measurements at the layer.
        shared: The rotary dims that all layers share, or None if the layer chooses its own.
    """

    def __init__(self, source: SourceAttention, calibration: Calibration, shared: SharedRope | None) -> None:
        self.source, self.calibration, self.shared = source, calibration, shared
        self.mix = calibration.mix
        self.damage = calibration.damage(self.mix)
        self._order = self.damage.argsort(descending=True)

    @classmethod
    def of(cls, source: SourceAttention, calibration: Calibration, shared: SharedRope | None = None) -> MixedHeads:
        """Return the mixed heads of a layer, which its calibration keeps, so that they are computed once."""
        return calibration.once(("mixed heads", shared), lambda: cls(source, calibration, shared))

    @cached_property
    def _keys(self) -> tuple[Tensor, Tensor]:
        """Return the complex components of the key weight, [C, d], and of the key bias, [C]."""
        return mixed_keys(self.mix, self.source.gained_key), mixed_keys(self.mix, self.source.gained_key_bias)

    def _split(self, rope_dim: int) -> tuple[Tensor, Tensor]:
        """Return the indices of the components that rotate and of those that do not."""
        if self.shared is not None:
            by_head = self.damage.unflatten(0, (self.source.geometry.num_key_value_heads, -1))  # [G, D/2]
            place = by_head.argsort(dim=0, descending=True).argsort(dim=0)
            rotating = (place < self.shared.counts.to(place.device)).flatten()
            return rotating.nonzero()[:, 0], (~rotating).nonzero()[:, 0]
        kept, rest = self._order.split([rope_dim // 2, len(self._order) - rope_dim // 2])
        return kept.sort().values, rest.sort().values

    def problem(self, geometry: MLAGeometry) -> WeightedFactorization:
        """Return the factorization of the rows that the latent holds.

        These are the rotating components if the rotary key is rebuilt, the position-free components, and the values.
        """
        key = (geometry.qk_rope_head_dim, geometry.rope_cache, self.shared)
        return self.calibration.factorization(key, lambda: self._rows(geometry), geometry.latent_bias)

    def stopped_error(self, geometry: MLAGeometry) -> float:
        """Return the squared error that the stopped rotations of a shape leave."""
        _, rest = self._split(geometry.qk_rope_head_dim)
        return STOPPED_WEIGHT * float(self.damage[rest].sum())

    def _rows(self, geometry: MLAGeometry) -> list[WeightedRows]:
        kept, rest = self._split(geometry.qk_rope_head_dim)
        weight, _ = self._keys
        rows = [
            WeightedRows(_stacked(weight[rest]), self._seen_through(rest)[None]),
            WeightedRows(self.source.value.flatten(0, 1), value_moments(self.source)),
        ]
        if geometry.rope_cache == "rebuilt":
            # On average over all rotations, both dims of a component weigh the same and components are uncorrelated.
            costs = self._seen_through(kept).diagonal().unflatten(0, (2, -1)).mean(0)  # [R/2]
            rows.insert(0, WeightedRows(_stacked(weight[kept]), costs.repeat(2)[:, None, None]))
        return rows

    def _seen_through(self, components: Tensor) -> Tensor:
        """Return the second moments of what reads some components, real parts before imaginary ones, [2·m, 2·m]."""
        maps = [query_map(self.mix, head, components) for head in range(self.source.geometry.num_key_value_heads)]
        readers = key_moments(self.source, self.calibration.moments)
        weighted = torch.cat([b @ m for b, m in zip(maps, readers, strict=True)], dim=1)
        return weighted @ torch.cat(maps, dim=1).T

    def tensors(self, geometry: MLAGeometry) -> dict[str, Tensor]:
        """Return all parameters and buffers of the layer by their names in the attention module."""
        g, source = geometry, self.source
        rebuilt = g.rope_cache == "rebuilt"
        kept, rest = self._split(g.qk_rope_head_dim)
        weight, bias = self._keys
        factors = self.problem(g).factors(g.kv_lora_rank)
        *rope_up, nope_up, value_up = factors.ups

        # These matrices map the position-free components back to the D dims of each key head.
        back = torch.stack([query_map(self.mix, head, rest).T for head in range(g.num_key_value_heads)])
        center = self.calibration.moments.input_mean
        rope_key, rope_bias = _stacked(weight[kept]), _stacked(bias[kept])
        pairs = (kept % (source.geometry.head_dim // 2))[None]
        tensors = latent_tensors(
            source,
            g,
            LatentFactors(factors.down, back @ nope_up, value_up.unflatten(0, (-1, g.v_head_dim)), center),
            key=back @ _stacked(weight[rest]),
            key_bias=back @ _stacked(bias[rest]),
            rope_key=rope_key[None, :0] if rebuilt else rope_key[None],
            rope_bias=rope_bias[None, :0] if rebuilt else rope_bias[None],
            pairs=pairs,
        )
        if g.latent_norm:
            tensors["kv_a_layernorm.weight"] = latent_gain(source, factors.down, self.calibration)
        if rebuilt:
            tensors["k_rope_proj.weight"] = rope_up[0]
            tensors["k_rope_proj.bias"] = rope_bias + rope_key @ center - rope_up[0] @ (factors.down @ center)
        return tensors | self._query_tensors(g, kept)

    def _query_tensors(self, g: MLAGeometry, kept: Tensor) -> dict[str, Tensor]:
        """Return the queries, each with the head's own dims for the position-free key before its rotary part."""
        source, tensors = self.source, {}
        share = g.num_attention_heads // g.num_key_value_heads
        gain = source.query_gain  # [1 or H, D]
        nope_scale = torch.full_like(gain[0], source.attention_scaling**2)
        maps = torch.stack([query_map(self.mix, head, kept) for head in range(g.num_key_value_heads)])
        views = maps.repeat_interleave(share, dim=0) * gain[:, None]  # [H, R, D]
        if g.key_norm:
            # The gain of the query norm stays in the norm for the position-free dims, and moves into the weights for
            # the rotary dims, which mix dims of different gains.
            own = torch.eye(g.head_dim, dtype=torch.float64, device=gain.device)
            ones = gain.new_ones(len(gain), g.qk_rope_head_dim)
            tensors["q_norm.weight"] = torch.cat([gain * nope_scale, ones], dim=1)
        else:
            own = nope_scale.diag()
        views = torch.cat([own.expand(len(views), -1, -1), views], dim=1)  # [H, D + R, D]
        tensors["q_proj.weight"] = (views @ source.query).flatten(0, 1)
        if g.query_bias:
            tensors["q_proj.bias"] = (views @ source.query_bias[..., None]).flatten()
        return tensors


def _stacked(components: Tensor) -> Tensor:
    """Return complex components [m, ...] as real rows [2·m, ...], with the real parts first."""
    return torch.cat([components.real, components.imag])
