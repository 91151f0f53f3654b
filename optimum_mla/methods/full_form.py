"""The full form of GQA2MLA, which rotates all dims of the keys that it makes from latents."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from optimum_mla.calibrate.calibration import Calibration
from optimum_mla.calibrate.weighting import key_moments, value_moments
from optimum_mla.core.geometry import MLAGeometry
from optimum_mla.methods.factors import stack_rows
from optimum_mla.methods.options import calibrated_rank
from optimum_mla.models import SourceAttention
from optimum_mla.ops.low_rank import low_rank_factors, rank_for_energy, singular_values
from optimum_mla.ops.weighted import WeightedFactorization, WeightedRows
from optimum_mla.plan.budget import RankBudget


def full_shape(source: SourceAttention, budget: RankBudget, factorization: str) -> MLAGeometry:
    """Return the shape of a layer with a latent for keys and one for values (`split`), or with one for both.

    Raises:
        InvalidValueError: The budget does not fit the layer.
    """
    g = source.geometry
    width = g.num_key_value_heads * g.head_dim
    shape: dict[str, int]
    if factorization == "split":
        keys, values = _split_ranks(source, budget, min(width, g.hidden_size))
        shape = {"k_lora_rank": keys, "v_lora_rank": values, "num_up_heads": g.num_attention_heads}
    else:
        largest = min(2 * width, g.hidden_size)
        if factorization == "calibrated":
            rank = calibrated_rank(budget, g, 0, largest)
        else:
            rank = budget.rank(g.source_cache_numbers, 0, largest, lambda: singular_values(stack_rows(source)))
        shape = {"kv_lora_rank": rank, "num_up_heads": g.num_key_value_heads}
    full = replace(g, attention_form="full", qk_rope_head_dim=g.head_dim, v_head_dim=g.head_dim)
    return replace(full, latent_bias=factorization == "calibrated", **shape)  # type: ignore[arg-type]


def _split_ranks(source: SourceAttention, budget: RankBudget, full: int) -> tuple[int, int]:
    """Return the ranks of the latents of keys and of values, each of at most `full`."""
    if budget.energy is not None:
        energies = [singular_values(weight.flatten(0, 1)) for weight in (source.key, source.value)]
        return rank_for_energy(energies[0], budget.energy), rank_for_energy(energies[1], budget.energy)
    both = budget.rank(source.geometry.source_cache_numbers, 0, 2 * full, lambda: torch.empty(0), smallest=2)
    return both // 2, both - both // 2


def full_problem(source: SourceAttention, calibration: Calibration) -> WeightedFactorization:
    """Return the factorization of [W_K ; W_V] with errors weighted by the rotating queries, by W_O and by the inputs.

    The gain of a key norm is part of the readers here, because it stays in the norm, after the latent.
    """

    def rows() -> list[WeightedRows]:
        gain = source.key_gain
        readers = gain[..., None] * key_moments(source, calibration.moments, rotating=True) * gain[:, None]
        return [
            WeightedRows(source.key.flatten(0, 1), readers),
            WeightedRows(source.value.flatten(0, 1), value_moments(source)),
        ]

    return calibration.factorization("full", rows)


def full_tensors(source: SourceAttention, geometry: MLAGeometry, calibration: Calibration | None) -> dict[str, Tensor]:
    """Return the tensors of a `FullLatentAttention` by their names.

    Args:
        source: The source attention.
        geometry: The layer's new shape; `kv_lora_rank` is 0 where keys and values have a latent each.
        calibration: Weighs the errors of a latent of both; None takes plain SVDs.
    """
    g = geometry
    tensors = {"q_proj.weight": source.query.flatten(0, 1), **source.output()}
    if g.query_bias:
        tensors["q_proj.bias"] = source.query_bias.flatten()
    if g.key_norm:
        tensors |= {"q_norm.weight": source.query_gain, "k_norm.weight": source.key_gain}
    return tensors | (_joint(source, g, calibration) if g.kv_lora_rank else _split(source, g))


def _split(source: SourceAttention, g: MLAGeometry) -> dict[str, Tensor]:
    """Return the projections of the paper's two latents, one for keys and one for values."""
    share = g.num_up_heads // g.num_key_value_heads
    tensors = {}
    sides = (
        ("k", source.key, source.key_bias, g.k_lora_rank),
        ("v", source.value, source.value_bias, g.v_lora_rank),
    )
    for side, weight, bias, rank in sides:
        down, up = low_rank_factors(weight.flatten(0, 1), rank)
        # The replicated weight has the same singular vectors and √(H/G) times the singular values.
        heads = up.view(g.num_key_value_heads, g.head_dim, rank).repeat_interleave(share, dim=0)
        tensors[f"{side}_a_proj.weight"] = down * share**0.25
        tensors[f"{side}_b_proj.weight"] = heads.flatten(0, 1) / share**0.25
        if g.up_bias:
            tensors[f"{side}_b_proj.bias"] = bias.repeat_interleave(share, dim=0).flatten()
    return tensors


def _joint(source: SourceAttention, g: MLAGeometry, calibration: Calibration | None) -> dict[str, Tensor]:
    """Return the projections of one latent for both keys and values."""
    biases = torch.cat([source.key_bias.flatten(), source.value_bias.flatten()])
    weight = stack_rows(source)
    if calibration is None:
        down, up = low_rank_factors(weight, g.kv_lora_rank)
    else:
        factors = full_problem(source, calibration).factors(g.kv_lora_rank)
        down, up = factors.down, torch.cat(factors.ups)
        center = calibration.moments.input_mean
        biases = biases + weight @ center - up @ (down @ center)
    keys = g.num_up_heads * g.head_dim
    tensors = {"kv_a_proj.weight": down, "k_b_proj.weight": up[:keys], "v_b_proj.weight": up[keys:]}
    if g.up_bias:
        tensors |= {"k_b_proj.bias": biases[:keys], "v_b_proj.bias": biases[keys:]}
    return tensors
