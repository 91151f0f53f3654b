"""Balancing of the scales of latents and of rotary keys, which a factorization does not determine.

A factorization may give latents that are a hundred times as large as the layer's inputs. The result is the same, but an
adapter on an up-projection adds products of its small weights with the latents, and an optimizer such as Adam takes
steps of one size in all of them. A learning rate that suits the source model would then be far too large.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from optimum_mla.core.geometry import MLAGeometry


def balanced(tensors: dict[str, Tensor], geometry: MLAGeometry, input_gain: Tensor) -> dict[str, Tensor]:
    """Return a layer's tensors with latents about as large as the inputs, and rotary queries as large as rotary keys.

    The layer computes the same, because the factors are powers of two and so cause no rounding. The inputs are taken to
    be normed and alike in all directions. Those of a real text are not, and their latents are up to a few times larger;
    they are also what the adapters on down-projections change, whose effect would grow if latents were any smaller.

    Args:
        tensors: The tensors of a converted layer by name.
        geometry: Shape of the layer.
        input_gain: The gain of the norm before the attention, [d].
    """
    g, scaled = geometry, {name: tensor.clone() for name, tensor in tensors.items()}
    latents: list[tuple[str, str, tuple[str, ...]]]
    if g.attention_form == "decoupled":
        latents = [("kv_a_proj_with_mqa", "kv_a_layernorm", ("kv_b_proj", "k_rope_proj"))]
    elif g.kv_lora_rank:
        latents = [("kv_a_proj", "", ("k_b_proj", "v_b_proj"))]
    else:
        latents = [("k_a_proj", "", ("k_b_proj",)), ("v_a_proj", "", ("v_b_proj",))]
    for down, norm, ups in latents:
        rows = slice(0, g.kv_lora_rank if g.attention_form == "decoupled" else None)
        _size_of_inputs(scaled, (down, norm, ups), rows, input_gain)
    if g.q_lora_rank is not None:
        _size_of_inputs(scaled, ("q_a_proj", "q_a_layernorm", ("q_b_proj",)), slice(None), input_gain)
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


def _size_of_inputs(
    tensors: dict[str, Tensor], names: tuple[str, str, tuple[str, ...]], rows: slice, input_gain: Tensor
) -> None:
    """Scale a latent, in place, to the root mean square of the layer's inputs.

    Args:
        tensors: The tensors of the layer.
        names: The down-projection, the norm after it, and the up-projections. Those that the layer lacks are passed
            over. A norm has the scale of the latent in its gain, and undoes that of the down-projection.
        rows: The rows of the down-projection that write the latent.
        input_gain: The gain of the norm before the attention, [d].
    """
    down, norm, ups = names
    gain = input_gain.to(tensors[f"{down}.weight"].device, torch.float64)
    latent = (tensors[f"{down}.weight"][rows].double() * gain).square().sum(1).mean().sqrt().item()
    size = gain.square().mean().sqrt().item()
    if not (0 < latent < math.inf and 0 < size < math.inf):
        return
    normed = f"{norm}.weight" in tensors
    into = [tensors[f"{norm}.weight"]] if normed else _parts(tensors, down, rows)
    _scale(into, [tensors[f"{up}.weight"] for up in ups if f"{up}.weight" in tensors], size / latent)


def _parts(tensors: dict[str, Tensor], module: str, rows: slice) -> list[Tensor]:
    """Return views of some rows of a linear layer's weight and, if it has one, of its bias."""
    return [tensors[name][rows] for name in (f"{module}.weight", f"{module}.bias") if name in tensors]


def _trade(one: list[Tensor], other: list[Tensor]) -> None:
    """Multiply `one` and divide `other` in place by a factor that brings their first tensors to a similar size."""
    sizes = [parts[0].double().square().mean().sqrt().item() for parts in (one, other)]
    if not all(0 < size < math.inf for size in sizes):
        return
    _scale(one, other, math.sqrt(sizes[1] / sizes[0]))


def _scale(one: list[Tensor], other: list[Tensor], factor: float) -> None:
    """Multiply `one` and divide `other` in place by the power of two next to a factor."""
    factor = 2.0 ** round(math.log2(factor))
    with torch.no_grad():
        for tensor in one:
            tensor.mul_(factor)
        for tensor in other:
            tensor.div_(factor)
