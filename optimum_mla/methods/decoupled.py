"""Weights of layers with a decoupled rotary key, made from factors and from a split into rotary and other dims."""

from __future__ import annotations

import torch
from torch import Tensor

from optimum_mla.calibrate.calibration import Calibration
from optimum_mla.core.geometry import MLAGeometry
from optimum_mla.methods.factors import LatentFactors, gather_dims
from optimum_mla.models import SourceAttention
from optimum_mla.ops.low_rank import low_rank_factors
from optimum_mla.ops.rope_split import RopeSplit


def latent_gain(source: SourceAttention, down: Tensor, calibration: Calibration | None) -> Tensor:
    """Return the root mean square of a latent, repeated to [r]; as the gain of a norm it changes the latent least.

    Without calibration it is the size that the latent is expected to have. The attention reads an RMS-normed state
    times a gain, so its channels have about the size of the gain, and the mean square of the latent is the mean over
    the rows of ‖down · diag(gain)‖².

    Args:
        source: The source attention.
        down: The down-projection to the latent, [r, d].
        calibration: Measurements at the layer, whose tokens then say the size.
    """
    if calibration is None:
        square = (down * source.input_gain.double()).square().sum(dim=1)
    else:
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
    if g.key_norm:  # The norm computes its factors from the source's keys.
        tensors["k_scale_proj.weight"] = source.key.flatten(0, 1)
        if g.key_value_bias:
            tensors["k_scale_proj.bias"] = source.key_bias.flatten()
    return tensors


def decoupled_tensors(
    source: SourceAttention, geometry: MLAGeometry, split: RopeSplit, factors: LatentFactors
) -> dict[str, Tensor]:
    """Return all tensors of a `DecoupledLatentAttention` whose dims are split as `split` says, by their names.

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
    return tensors | _query_tensors(source, g, split)


def _query_tensors(source: SourceAttention, g: MLAGeometry, split: RopeSplit) -> dict[str, Tensor]:
    """Return the query projections, with each head's position-free dims first, as DeepSeek has them, and their norms.

    A rotary embedding with an attention factor s, as with YaRN, multiplies queries and keys by s. Position-free dims
    are no longer multiplied by it, so their query weights, or the gain of the query norm, are multiplied by s² instead.
    """
    order = torch.cat([split.nope, split.rope], dim=-1)  # [K, D]
    scale = torch.ones(order.shape[-1], dtype=torch.float64, device=source.query.device)
    if not g.key_norm:
        scale[: split.nope.shape[-1]] = source.attention_scaling**2
    weight = (gather_dims(source.query, order) * scale[:, None]).flatten(0, 1)
    if g.q_lora_rank is None:
        last, tensors = "q_proj", {"q_proj.weight": weight}
    else:
        down, up = low_rank_factors(weight, g.q_lora_rank)
        last, tensors = "q_b_proj", {"q_a_proj.weight": down, "q_b_proj.weight": up}
        if g.latent_norm:
            tensors["q_a_layernorm.weight"] = latent_gain(source, down, None)
    if g.query_bias:
        tensors[f"{last}.bias"] = (gather_dims(source.query_bias, order) * scale).flatten()
    if g.key_norm:
        gain = source.query_gain
        gain = gather_dims(gain if g.joint_norms else gain.expand(len(order), -1), order)
        gain[:, : g.qk_nope_head_dim] *= source.attention_scaling**2
        tensors["q_norm.weight"] = gain
    return tensors
