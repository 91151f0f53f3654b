"""The scale of latents and rotary keys, which a factorization leaves open.

A calibrated factorization may leave a down-projection a hundred times as large as its up-projection. That computes the
same, but an optimizer like Adam takes steps of one size in both: too large for one, too small for the other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from optimum_mla.geometry import MLAGeometry


def balanced(tensors: dict[str, Tensor], geometry: MLAGeometry) -> dict[str, Tensor]:
    """The same layer with down- and up-projections of like size, and rotary queries and keys too.

    Factors are powers of two, which no rounding notices.

    Args:
        tensors: A converted layer's, by name.
        geometry: Its shape.
    """
    g, scaled = geometry, {name: tensor.clone() for name, tensor in tensors.items()}
    if not g.latent_norm:  # which sets the scale of a latent itself
        if g.attention_form == "decoupled":
            latents = [("kv_a_proj_with_mqa", ["kv_b_proj", "k_rope_proj"])]
        elif g.kv_lora_rank:
            latents = [("kv_a_proj", ["k_b_proj", "v_b_proj"])]
        else:
            latents = [("k_a_proj", ["k_b_proj"]), ("v_a_proj", ["v_b_proj"])]
        for down, ups in latents:
            width = g.kv_lora_rank if g.attention_form == "decoupled" else None
            into = _parts(scaled, down, slice(0, width))
            out_of = [scaled[f"{up}.weight"] for up in ups if f"{up}.weight" in scaled]
            _trade(into, out_of)
    if g.attention_form == "decoupled" and g.qk_rope_head_dim and not g.key_norm:
        keys = (
            _parts(scaled, "k_rope_proj", slice(None))
            if g.rope_cache == "rebuilt"
            else _parts(scaled, "kv_a_proj_with_mqa", slice(g.kv_lora_rank, None))
        )
        queries = "q_proj" if g.q_lora_rank is None else "q_b_proj"
        heads = [
            tensor.unflatten(0, (g.num_attention_heads, -1))[:, g.qk_nope_head_dim :]
            for tensor in _parts(scaled, queries, slice(None))
        ]
        _trade(keys, heads)
    return scaled


def _parts(tensors: dict[str, Tensor], module: str, rows: slice) -> list[Tensor]:
    """Rows of a linear layer's weight and, where it has one, of its bias; views."""
    return [tensors[name][rows] for name in (f"{module}.weight", f"{module}.bias") if name in tensors]


def _trade(one: list[Tensor], other: list[Tensor]) -> None:
    """Multiply all of `one` and divide all of `other`, in place, so that the first of each are of like size."""
    sizes = [parts[0].double().square().mean().sqrt().item() for parts in (one, other)]
    if not all(0 < size < math.inf for size in sizes):
        return
    factor = 2.0 ** round(math.log2(sizes[1] / sizes[0]) / 2)
    with torch.no_grad():
        for tensor in one:
            tensor.mul_(factor)
        for tensor in other:
            tensor.div_(factor)
