"""Weights of layers with a decoupled rotary key, made from factors and from a split into rotary and other dims."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from optimum_mla.calibrate.calibration import Calibration
from optimum_mla.calibrate.weighting import key_moments, value_moments
from optimum_mla.core.geometry import MLAGeometry
from optimum_mla.models import SourceAttention
from optimum_mla.ops.low_rank import low_rank_factors
from optimum_mla.ops.rope_split import RopeSplit
from optimum_mla.ops.weighted import WeightedFactorization, WeightedRows


class LatentFactors(NamedTuple):
    """The factors of a latent.

    Attributes:
        down: The down-projection to the latent, [r, d].
        key_up: The up-projection to the position-free keys, [G, n, r].
        value_up: The up-projection to the values, [G, D, r].
        center: The mean of the inputs, [d], at which biases after the up-projections make the layer exact; None
            without such biases.
    """

    down: Tensor
    key_up: Tensor
    value_up: Tensor
    center: Tensor | None = None


def gather_dims(heads: Tensor, dims: Tensor) -> Tensor:
    """Return some dims of each head, [X, m, ...].

    Args:
        heads: Tensors by head and dim, [X, D, ...].
        dims: Indices of dims, [K, m]. Each row applies to X/K consecutive heads.
    """
    rows = dims.to(heads.device).repeat_interleave(heads.shape[0] // dims.shape[0], dim=0)  # [X, m]
    return heads[torch.arange(heads.shape[0], device=heads.device)[:, None], rows]


def reorder_query(source: SourceAttention, split: RopeSplit) -> tuple[Tensor, Tensor]:
    """Return W_Q [H, n + R, d] and its bias [H, n + R] with each head's position-free dims first, as DeepSeek has them.

    A rotary embedding with an attention factor s, as with YaRN, multiplies queries and keys by s. Position-free dims
    are no longer multiplied by it, so their query weights are multiplied by s² instead.
    """
    order = torch.cat([split.nope, split.rope], dim=-1)
    scale = torch.ones(order.shape[-1], dtype=torch.float64, device=source.query.device)
    if not source.geometry.key_norm:
        scale[: split.nope.shape[-1]] = source.attention_scaling**2
    weight = gather_dims(source.query, order) * scale[:, None]
    return weight, gather_dims(source.query_bias, order) * scale


def split_factors(source: SourceAttention, split: RopeSplit, rank: int) -> LatentFactors:
    """Return the factors of keys and of values by an SVD each with half the rank, as a latent of two parts."""
    key, value = _latent_rows(source, split)
    keys, values = (
        low_rank_factors(key.flatten(0, 1), rank // 2),
        low_rank_factors(value.flatten(0, 1), (rank + 1) // 2),
    )
    up = torch.block_diag(keys.up, values.up)
    return LatentFactors(torch.cat([keys.down, values.down]), *_by_heads(up, key, value))


def joint_factors(source: SourceAttention, split: RopeSplit, rank: int) -> LatentFactors:
    """Return the factors of [W_K,nope ; W_V] by one SVD."""
    key, value = _latent_rows(source, split)
    factors = low_rank_factors(torch.cat([key.flatten(0, 1), value.flatten(0, 1)]), rank)
    return LatentFactors(factors.down, *_by_heads(factors.up, key, value))


def calibrated_problem(
    source: SourceAttention, split: RopeSplit, calibration: Calibration, centered: bool = True
) -> WeightedFactorization:
    """Return the factorization of [W_K,nope ; W_V] with errors weighted by the queries, by W_O and by the inputs."""

    def rows() -> list[WeightedRows]:
        key, value = _latent_rows(source, split)
        readers = gather_dims(gather_dims(key_moments(source, calibration.moments), split.nope).mT, split.nope)
        return [WeightedRows(key.flatten(0, 1), readers), WeightedRows(value.flatten(0, 1), value_moments(source))]

    return calibration.factorization(split.rope.tolist(), rows, centered)


def calibrated_factors(
    source: SourceAttention, split: RopeSplit, rank: int, calibration: Calibration, centered: bool = True
) -> LatentFactors:
    """Return the best factors of `calibrated_problem` for a rank."""
    factors = calibrated_problem(source, split, calibration, centered).factors(rank)
    key, value = _latent_rows(source, split)
    up = torch.cat(factors.ups)
    return LatentFactors(factors.down, *_by_heads(up, key, value), calibration.moments.input_mean)


def _latent_rows(source: SourceAttention, split: RopeSplit) -> tuple[Tensor, Tensor]:
    """Return the weights of the position-free keys, [G, n, d], and of the values, [G, D, d]."""
    return gather_dims(source.gained_key, split.nope), source.value


def _by_heads(up: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    key_up, value_up = up.split([key.shape[0] * key.shape[1], value.shape[0] * value.shape[1]])
    return key_up.unflatten(0, key.shape[:2]), value_up.unflatten(0, value.shape[:2])


def latent_size(down: Tensor, calibration: Calibration) -> Tensor:
    """Return the root mean square of the latents of the calibration tokens, repeated to [r].

    As the gain of a norm on the latent, it makes the norm change these latents least.
    """
    square = torch.einsum("rd,de,re->r", down, calibration.moments.raw_inputs.to(down.dtype), down)
    return square.mean().sqrt().repeat(len(down))


def latent_tensors(
    source: SourceAttention,
    geometry: MLAGeometry,
    factors: LatentFactors,
    key: Tensor,
    key_bias: Tensor,
    rope_key: Tensor,
    rope_bias: Tensor,
    pairs: Tensor,
) -> dict[str, Tensor]:
    """Return the tensors of a `DecoupledLatentAttention`, except for those of the queries, by their names.

    The biases of position-free keys and of values become biases of the up-projection, where they take no rank.

    Args:
        source: The source attention.
        geometry: The layer's new shape.
        factors: The factors of the latent.
        key: The weight that `factors.key_up @ factors.down` approximates, [G, n, d].
        key_bias: The bias of the position-free keys, [G, n].
        rope_key: The weight of the cached rotary keys, [K, R, d].
        rope_bias: The bias of the cached rotary keys, [K, R].
        pairs: The source's rotary pair from which each rotary pair comes, [K, R/2].
    """
    g = geometry
    share = g.num_up_heads // g.num_key_value_heads
    # Repeating heads `share` times multiplies the singular values by √share, which both projections share equally.
    balance = share**0.25
    up = torch.cat([factors.key_up, factors.value_up], dim=1)  # [G, n + D, r]
    tensors = {
        "kv_a_proj_with_mqa.weight": torch.cat([factors.down * balance, rope_key.flatten(0, 1)]),
        "kv_b_proj.weight": up.repeat_interleave(share, dim=0).flatten(0, 1) / balance,
        "rope_pairs": pairs.to(torch.long),
        **source.output(),
    }
    if g.up_bias:
        bias = torch.cat([key_bias, source.value_bias], dim=1)
        if factors.center is not None:
            rows = torch.cat([key, source.value], dim=1)  # [G, n + D, d]
            bias = bias + rows @ factors.center - up @ (factors.down @ factors.center)
        tensors["kv_b_proj.bias"] = bias.repeat_interleave(share, dim=0).flatten()
    if g.key_value_bias:
        tensors["kv_a_proj_with_mqa.bias"] = torch.cat([torch.zeros_like(factors.down[:, 0]), rope_bias.flatten()])
    return tensors | key_scale_tensors(source)


def decoupled_tensors(
    source: SourceAttention, geometry: MLAGeometry, split: RopeSplit, factors: LatentFactors
) -> dict[str, Tensor]:
    """Return `latent_tensors`, and the query norm, for dims that are split as `split` says.

    Each rotary key is the mean of the key heads that share it.
    """
    g = geometry

    def rotary(heads: Tensor) -> Tensor:
        return gather_dims(heads, split.rope).unflatten(0, (g.num_rope_heads, -1)).mean(1)

    tensors = latent_tensors(
        source,
        g,
        factors,
        gather_dims(source.gained_key, split.nope),
        gather_dims(source.gained_key_bias, split.nope),
        rotary(source.gained_key),
        rotary(source.gained_key_bias),
        split.pairs,
    )
    if g.key_norm:
        order = torch.cat([split.nope, split.rope], dim=-1)  # [K, D]
        gain = source.query_gain
        gain = gather_dims(gain if g.joint_norms else gain.expand(len(order), -1), order)
        gain[:, : g.qk_nope_head_dim] *= source.attention_scaling**2
        tensors["q_norm.weight"] = gain
    return tensors


def key_scale_tensors(source: SourceAttention) -> dict[str, Tensor]:
    """Return the source's key projection, from which a key norm computes its factors; nothing without a key norm."""
    if not source.geometry.key_norm:
        return {}
    tensors = {"k_scale_proj.weight": source.key.flatten(0, 1)}
    if source.geometry.key_value_bias:
        tensors["k_scale_proj.bias"] = source.key_bias.flatten()
    return tensors
