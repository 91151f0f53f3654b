"""Codes of what one layer caches: the bits of its channels, and the projections that make latents their own codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from optimum_mla.codec.fit import CodeTable, allocate_bits
from optimum_mla.core.geometry import FACTOR_BITS, FACTOR_CENTRE, SINK_TOKENS, MLAGeometry
from optimum_mla.core.segments import GRANULE, WIDTHS, segments, total_channels
from optimum_mla.families.project import SourceAttention
from optimum_mla.nn.norm import inverse_rms

DOWN = ("kv_a_proj_with_mqa", "kv_a_proj")
"""Names of the projection that makes the joint latent."""
READERS = ("kv_b_proj", "k_rope_proj", "k_b_proj", "v_b_proj")
"""Names of the projections that read it."""


class LayerCodes:
    """The codes of a layer's latent, and of its rotary key if this is cached, for any number of bits.

    Args:
        source: The attention that was converted.
        geometry: Shape of the layer, with the largest rank and without codes.
        tensors: Its tensors.
        costs: Weighted squared error that a unit of squared error in each channel of the latent costs, [r].
        inputs: Normed inputs of tokens that are to be coded, [T, d].
        rope_costs: The same as `costs` for a dim of each pair of the cached rotary key, [R/2]; None without one.
        together: Whether all dims of the rotary key get the same bits, so that all layers can share it.
    """

    def __init__(
        self,
        source: SourceAttention,
        geometry: MLAGeometry,
        tensors: Mapping[str, Tensor],
        costs: Tensor,
        inputs: Tensor,
        rope_costs: Tensor | None = None,
        together: bool = False,
    ) -> None:
        self._geometry, self._rank, self._tensors = geometry, len(costs), dict(tensors)
        (self._down,) = (name for name in DOWN if f"{name}.weight" in tensors)
        if geometry.scale_numbers:
            self._tensors |= _coded_factors(source, geometry, self._tensors, inputs)
        weight, bias = self._tensors[f"{self._down}.weight"], self._tensors.get(f"{self._down}.bias")
        # Without the mean of the inputs, what is constant is so to the last bit, and the rest loses no digits to it.
        mean = inputs.double().mean(0)
        cached = (inputs.double() - mean).to(inputs.dtype) @ weight.to(inputs.dtype).T
        offset = weight @ mean if bias is None else weight @ mean + bias
        table = CodeTable.fit(cached[:, : self._rank], costs)
        self._table = replace(table, mean=table.mean + offset[: self._rank])
        self._pairs: CodeTable | None = None
        self._order = torch.arange(0 if rope_costs is None else len(rope_costs), device=costs.device)
        self._together = geometry.qk_rope_head_dim if together and rope_costs is not None else 0
        if rope_costs is not None:
            keys = (cached + offset.to(cached.dtype))[:, self._rank :]
            self._pairs = _pair_table(keys * source.attention_scaling, rope_costs)
            if not together:
                self._order = self._pairs.errors[:, 0].argsort(descending=True)

    def _widths(self, bits: int) -> tuple[Tensor, Tensor]:
        """Return the bits of the channels of the latent, [r], and of the rotary pairs in their own order, [R/2].

        A latent has one group of channels with one bit at least, also where none is worth any.
        """
        whole = self._rank // GRANULE * GRANULE  # What is left over gets no bits in any case.
        channels, dims = self._table.errors[:whole], self._table.errors[:0]
        if self._pairs is not None:
            dims = self._pairs.errors[self._order].repeat_interleave(2, dim=0)
        widths = allocate_bits(torch.cat([channels, dims]), bits, self._together)
        latent, pairs = torch.zeros_like(self._table.mean, dtype=torch.long), widths[whole::2]
        latent[:whole] = widths[:whole]
        if not latent.any():
            latent[:GRANULE] = min(WIDTHS)
            pairs = allocate_bits(dims, bits - GRANULE * min(WIDTHS), self._together)[::2]
        return latent, torch.empty_like(self._order).scatter_(0, self._order, pairs)

    def error(self, bits: int) -> float:
        """Return the weighted squared error that codes of so many bits per token leave."""
        latent, pairs = self._widths(bits)
        return self._table.error(latent) + (0.0 if self._pairs is None else 2 * self._pairs.error(pairs))

    def coded(self, bits: int) -> tuple[MLAGeometry, dict[str, Tensor]]:
        """Return the layer's shape and tensors with codes of at most so many bits per token.

        The step and the centre of each channel are folded into the projections, so that code k of a channel stands for
        k times its step plus its centre. Channels are ordered by their bits, and those without bits are left out.
        """
        g, tensors = self._geometry, dict(self._tensors)
        widths, pairs = self._widths(bits)
        if g.scale_numbers:
            g = replace(g, factor_bits=FACTOR_BITS)
        if self._pairs is not None:
            g = self._code_rotary_key(g, tensors, self._pairs, pairs)
        order = widths.argsort(descending=True, stable=True)
        order, dropped = order[widths[order] > 0], order[widths[order] == 0]
        steps, centres = (part[order] for part in self._table.centres(widths))
        weight, bias = tensors[f"{self._down}.weight"], tensors.get(f"{self._down}.bias")
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        rest = slice(self._rank, None)  # a rotary key that is cached beside the latent
        tensors[f"{self._down}.weight"] = torch.cat([_in_steps(weight[order], steps), weight[rest]])
        tensors[f"{self._down}.bias"] = torch.cat([_in_steps(bias[order] - centres, steps), bias[rest]])
        for name in READERS:
            if f"{name}.weight" in tensors:
                up = tensors[f"{name}.weight"]
                constant = up[:, order] @ centres + up[:, dropped] @ self._table.mean[dropped]
                tensors[f"{name}.weight"] = up[:, order] * steps
                tensors[f"{name}.bias"] = tensors[f"{name}.bias"] + constant
        channels = segments(widths[order].tolist())
        shape = replace(g, kv_lora_rank=total_channels(channels), channel_bits=channels, sink_tokens=SINK_TOKENS)
        return shape, tensors

    def _code_rotary_key(
        self, g: MLAGeometry, tensors: dict[str, Tensor], table: CodeTable, widths: Tensor
    ) -> MLAGeometry:
        """Fold the steps of a cached rotary key into the projections, in place, and return the shape with its codes.

        Args:
            g: Shape of the layer.
            tensors: Its tensors.
            table: The codes of the rotary pairs.
            widths: Bits of both dims of each pair, [R/2].
        """
        order = widths.argsort(descending=True, stable=True)
        order = order[widths[order] > 0]
        steps = table.centres(widths)[0][order].repeat(2)
        dims = torch.cat([order, order + len(widths)])
        for part in ("weight", "bias"):
            if (down := tensors.get(f"{self._down}.{part}")) is not None:
                key = _in_steps(down[self._rank :][dims], steps)
                tensors[f"{self._down}.{part}"] = torch.cat([down[: self._rank], key])
            if (query := tensors.get(f"q_proj.{part}")) is not None:
                heads = query.unflatten(0, (g.num_attention_heads, -1))  # [H, n + R, ...]
                rope = heads[:, g.qk_nope_head_dim :][:, dims]
                rope = rope * (steps[:, None] if rope.ndim == 3 else steps)
                tensors[f"q_proj.{part}"] = torch.cat([heads[:, : g.qk_nope_head_dim], rope], dim=1).flatten(0, 1)
        if "q_norm.weight" in tensors:
            gain = tensors["q_norm.weight"]
            tensors["q_norm.weight"] = torch.cat(
                [gain[:, : g.qk_nope_head_dim], gain[:, g.qk_nope_head_dim :][:, dims]], dim=1
            )
        tensors["rope_pairs"] = tensors["rope_pairs"][:, order]
        bits = segments(widths[order].repeat_interleave(2).tolist())
        return replace(g, qk_rope_head_dim=len(dims), rope_channel_bits=bits)


def _in_steps(rows: Tensor, steps: Tensor) -> Tensor:
    """Return the rows of a projection [m, ...] in units of steps [m], and zeros where the step of a row is 0."""
    units = torch.where(steps > 0, 1 / steps, 0.0)
    return rows * (units[:, None] if rows.ndim == 2 else units)


def _pair_table(dims: Tensor, costs: Tensor) -> CodeTable:
    """Return the codes of rotary pairs, whose dims are about zero and alike, because the pairs turn.

    Args:
        dims: The dims of the pairs before their rotation, [T, R], all first dims before all second ones.
        costs: Weighted squared error that a unit of squared error in a dim of each pair costs, [R/2].
    """
    first, second = dims.chunk(2, dim=-1)
    between = ((first + second) / 2**0.5, (first - second) / 2**0.5)  # turned by an eighth
    return CodeTable.fit(torch.cat([first, second, *between]), costs, about_mean=False)


def _coded_factors(
    source: SourceAttention, geometry: MLAGeometry, tensors: Mapping[str, Tensor], inputs: Tensor
) -> dict[str, Tensor]:
    """Return the tensors that make the factors of key norms codes: their scale, and the gains of the queries.

    The scale puts the mean factor of each key head on the middle of the codes' range.
    """
    g = geometry
    keys = inputs @ tensors["k_scale_proj.weight"].to(inputs.dtype).T
    if "k_scale_proj.bias" in tensors:
        keys = keys + tensors["k_scale_proj.bias"].to(inputs.dtype)
    factors = inverse_rms(keys.unflatten(-1, (-1, g.head_dim)), source.eps, (1, 2) if g.joint_norms else (2,))
    scale = FACTOR_CENTRE / factors.flatten(1).double().mean(0)  # [G or 1]
    gain = tensors["q_norm.weight"]
    rows = replace(g, factor_bits=FACTOR_BITS).query_gains
    gains = gain.repeat_interleave(rows // len(gain), dim=0) / scale.repeat_interleave(rows // len(scale))[:, None]
    return {"key_factor_scale": scale, "q_norm.weight": gains}


def with_equal_bits(geometry: MLAGeometry, bits: int, width: int | None = None) -> MLAGeometry:
    """Return a shape with codes of so many bits in all channels together, as if all channels deserved the same.

    Args:
        geometry: The shape with the largest rank and without codes.
        bits: Bits of the codes of one token.
        width: Bits of each channel. None takes 4, or more where all channels would have room for them; then the shape
            stands for the one that calibration will choose, whose bytes it has up to a few.
    """
    rope, most = geometry.cached_rope_dims, geometry.kv_lora_rank // GRANULE * GRANULE
    if width is None:
        enough = (one for one in reversed(WIDTHS) if one >= min(4, bits // GRANULE) and one * (most + rope) >= bits)
        width = next(enough, max(WIDTHS))
    room = bits // width // GRANULE * GRANULE
    rope = min(rope, room // 2 // GRANULE * GRANULE)
    channels = min(most, max(GRANULE, room - rope))
    shape = replace(geometry, kv_lora_rank=channels, channel_bits=((width, channels),), sink_tokens=SINK_TOKENS)
    if geometry.scale_numbers:
        shape = replace(shape, factor_bits=FACTOR_BITS)
    if not geometry.cached_rope_dims:
        return shape
    return replace(shape, qk_rope_head_dim=rope, rope_channel_bits=((width, rope),) if rope else ())
