"""The part that the methods with a decoupled rotary key share: from factors and a partition of the dims to weights."""

from __future__ import annotations

import torch
from torch import Tensor

from optimum_mla.geometry import MLAGeometry
from optimum_mla.models import SourceAttention
from optimum_mla.ops.rope_split import RopeSplit


def gather_dims(heads: Tensor, dims: Tensor) -> Tensor:
    """Pick dims of each head: heads [X, D, ...], dims [K, m], X/K consecutive heads to a row of `dims`: [X, m, ...]."""
    rows = dims.to(heads.device).repeat_interleave(heads.shape[0] // dims.shape[0], dim=0)  # [X, m]
    return heads[torch.arange(heads.shape[0], device=heads.device)[:, None], rows]


def reorder_query(source: SourceAttention, split: RopeSplit) -> tuple[Tensor, Tensor]:
    """W_Q [H, n + R, d] and its bias [H, n + R] with each head's dims in DeepSeek's order, position-free first.

    A rotary embedding with an attention factor s (YaRN) scales queries and keys by s each. Dims that lose their
    rotation lose that too: the query gets s² instead.
    """
    order = torch.cat([split.nope, split.rope], dim=-1)
    scale = torch.ones(order.shape[-1], dtype=torch.float64, device=source.query.device)
    if not source.geometry.key_norm:
        scale[: split.nope.shape[-1]] = source.attention_scaling**2
    weight = gather_dims(source.query, order) * scale[:, None]
    return weight, gather_dims(source.query_bias, order) * scale


def decoupled_tensors(
    source: SourceAttention,
    geometry: MLAGeometry,
    split: RopeSplit,
    down: Tensor,
    key_up: Tensor,
    value_up: Tensor,
    rope_key: Tensor,
    rope_bias: Tensor,
) -> dict[str, Tensor]:
    """All parameters but the queries' of a `DecoupledLatentAttention`.

    Biases need no rank: those of position-free keys and of values move behind the up-projection as they are.

    Args:
        source: The source attention.
        geometry: The layer's new shape.
        split: Partition of the dims, K rows.
        down: [r, d].
        key_up: [U, n, r].
        value_up: [U, D, r].
        rope_key: Rotary part of W_K, [K, R, d]. rope_bias: [K, R].
    """
    g, spec = geometry, source.spec
    share = g.num_up_heads // g.num_key_value_heads
    tensors = {
        "kv_a_proj_with_mqa.weight": torch.cat([down, rope_key.flatten(0, 1)]),
        "kv_b_proj.weight": torch.cat([key_up, value_up], dim=1).flatten(0, 1),
        "rope_pairs": split.pairs.to(torch.long),
        **source.output(),
    }
    if g.key_value_bias:
        nope_bias = gather_dims(source.key_bias, split.nope)
        up_bias = torch.cat([nope_bias, source.value_bias], dim=-1).repeat_interleave(share, dim=0)
        tensors["kv_b_proj.bias"] = up_bias.flatten()
        tensors["kv_a_proj_with_mqa.bias"] = torch.cat([torch.zeros_like(down[:, 0]), rope_bias.flatten()])
    if g.key_norm:
        order = torch.cat([split.nope, split.rope], dim=-1)  # [K, D]
        query_gain = source.norm_gain(spec.query_norm).to(down.device)[order]
        query_gain[:, : g.qk_nope_head_dim] *= source.attention_scaling**2
        tensors["q_norm.weight"] = query_gain
        tensors["k_norm.weight"] = source.norm_gain(spec.key_norm).to(down.device)[order]
    return tensors
