"""Factors of a latent from which position-free keys and values are made, by plain SVDs or weighted by calibration."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from optimum_mla.calibrate.calibration import Calibration
from optimum_mla.calibrate.weighting import key_moments, value_moments
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


def stack_rows(source: SourceAttention, gained: bool = False) -> Tensor:
    """Return [W_K ; W_V], the keys times the gain of their norm if `gained`, [2·G·D, d]."""
    key = source.gained_key if gained else source.key
    return torch.cat([key.flatten(0, 1), source.value.flatten(0, 1)])


def split_factors(source: SourceAttention, split: RopeSplit, rank: int) -> LatentFactors:
    """Return the factors of keys and of values by an SVD each with half the rank, as a latent of two parts."""
    key, value = _latent_rows(source, split)
    keys = low_rank_factors(key.flatten(0, 1), rank // 2)
    values = low_rank_factors(value.flatten(0, 1), (rank + 1) // 2)
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

    return calibration.factorization(tuple(split.rope.flatten().tolist()), rows, centered)


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
