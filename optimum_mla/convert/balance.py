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
from optimum_mla.nn import ATTENTION_FORMS
from optimum_mla.nn.projections import Latent


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
    roles = ATTENTION_FORMS[g.attention_form].roles
    for latent in roles.latents:
        _size_of_inputs(scaled, latent, slice(0, g.kv_lora_rank or None), input_gain)
    if roles.query_latent is not None:
        _size_of_inputs(scaled, roles.query_latent, slice(None), input_gain)
    if g.attention_form == "decoupled" and g.qk_rope_head_dim and not g.key_norm:
        (latent,) = roles.latents
        keys = _parts(scaled, latent.down, slice(g.kv_lora_rank, None))
        if g.rope_cache == "rebuilt":
            keys = _parts(scaled, latent.rotary, slice(None))
        (queries,) = (name for name in roles.queries if f"{name}.weight" in scaled)
        heads = [
            tensor.unflatten(0, (g.num_attention_heads, -1))[:, g.qk_nope_head_dim :]
            for tensor in _parts(scaled, queries, slice(None))
        ]
        _trade(keys, heads)
    return scaled


def _size_of_inputs(tensors: dict[str, Tensor], latent: Latent, rows: slice, input_gain: Tensor) -> None:
    """Scale a latent, in place, to the root mean square of the layer's inputs.

    A norm has the scale of the latent in its gain, and undoes that of the down-projection.

    Args:
        tensors: The tensors of the layer. Where it lacks the latent, nothing changes.
        latent: The names of the modules around the latent.
        rows: The rows of the down-projection that write the latent.
        input_gain: The gain of the norm before the attention, [d].
    """
    weight = tensors.get(f"{latent.down}.weight")
    if weight is None:
        return
    gain = input_gain.to(weight.device, torch.float64)
    found = (weight[rows].double() * gain).square().sum(1).mean().sqrt().item()
    size = gain.square().mean().sqrt().item()
    if not (0 < found < math.inf and 0 < size < math.inf):
        return
    norm = tensors.get(f"{latent.norm}.weight")
    into = _parts(tensors, latent.down, rows) if norm is None else [norm]
    _scale(into, [tensors[f"{up}.weight"] for up in latent.readers if f"{up}.weight" in tensors], size / found)


def _parts(tensors: dict[str, Tensor], module: str | None, rows: slice) -> list[Tensor]:
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
