"""Balancing of the scales of projections, which a factorization does not determine.

A calibrated factorization may give a down-projection that is a hundred times as large as its up-projection. The result
is the same, but an optimizer such as Adam takes steps of one size in both, which is too large for one of them and too
small for the other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from optimum_mla.core.geometry import MLAGeometry


def balanced(tensors: dict[str, Tensor], geometry: MLAGeometry) -> dict[str, Tensor]:
    """Return a layer's tensors with down- and up-projections of similar size, and rotary queries and keys too.

    The layer computes the same, because the factors are powers of two and so cause no rounding.

    Args:
        tensors: The tensors of a converted layer by name.
        geometry: Shape of the layer.
    """
    g, scaled = geometry, {name: tensor.clone() for name, tensor in tensors.items()}
    if not g.latent_norm and not g.channel_bits:  # A norm sets the scale of the latent itself; codes have a step of 1.
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
    if g.attention_form == "decoupled" and g.qk_rope_head_dim and not (g.key_norm or g.rope_channel_bits):
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
    """Return views of some rows of a linear layer's weight and, if it has one, of its bias."""
    return [tensors[name][rows] for name in (f"{module}.weight", f"{module}.bias") if name in tensors]


def _trade(one: list[Tensor], other: list[Tensor]) -> None:
    """Multiply `one` and divide `other` in place by a factor that brings their first tensors to a similar size."""
    sizes = [parts[0].double().square().mean().sqrt().item() for parts in (one, other)]
    if not all(0 < size < math.inf for size in sizes):
        return
    factor = 2.0 ** round(math.log2(sizes[1] / sizes[0]) / 2)
    with torch.no_grad():
        for tensor in one:
            tensor.mul_(factor)
        for tensor in other:
            tensor.div_(factor)
