"""Codes of one layer's latent: the bits of its channels, and the projections that make latents their own codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from optimum_mla.codec.fit import CodeTable, allocate_bits
from optimum_mla.core.geometry import SINK_TOKENS, MLAGeometry
from optimum_mla.core.segments import GRANULE, WIDTHS, ChannelBits, segments

DOWN = ("kv_a_proj_with_mqa", "kv_a_proj")
"""Names of the projection that makes the joint latent."""
READERS = ("kv_b_proj", "k_rope_proj", "k_b_proj", "v_b_proj")
"""Names of the projections that read it."""


class LayerCodes:
    """The codes of a layer's latent for any number of bits.

    Args:
        tensors: The tensors of the layer with a latent of the largest rank and without codes.
        costs: Weighted squared error that a unit of squared error in each channel of the latent costs, [r].
        inputs: Normed inputs of tokens that are to be coded, [T, d].
    """

    def __init__(self, tensors: Mapping[str, Tensor], costs: Tensor, inputs: Tensor) -> None:
        self._tensors, self._rank = tensors, len(costs)
        (self._down,) = (name for name in DOWN if f"{name}.weight" in tensors)
        weight, bias = (self._tensors.get(f"{self._down}.{part}") for part in ("weight", "bias"))
        if weight is None:
            raise KeyError(f"{self._down}.weight")
        latents = inputs @ weight[: self._rank].to(inputs.dtype).T
        if bias is not None:
            latents = latents + bias[: self._rank].to(inputs.dtype)
        self._table = CodeTable.fit(latents, costs)

    def error(self, bits: int) -> float:
        """Return the weighted squared error that codes of so many bits per token leave."""
        return self._table.error(allocate_bits(self._table.errors, bits))

    def coded(self, bits: int) -> tuple[dict[str, Tensor], ChannelBits]:
        """Return the layer's tensors with codes of at most so many bits per token, and the bits of the channels.

        The step and the centre of each channel are folded into the projections, so that code k of a channel stands for
        k times its step plus its centre. Channels are ordered by their bits, and those without bits are left out.
        """
        widths = allocate_bits(self._table.errors, bits)
        order = widths.argsort(descending=True, stable=True)
        order, dropped = order[widths[order] > 0], order[widths[order] == 0]
        steps, centres = (part[order] for part in self._table.centres(widths))
        tensors = dict(self._tensors)
        weight, bias = tensors[f"{self._down}.weight"], tensors.get(f"{self._down}.bias")
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        rest = slice(self._rank, None)  # a rotary key that is cached beside the latent
        tensors[f"{self._down}.weight"] = torch.cat([weight[order] / steps[:, None], weight[rest]])
        tensors[f"{self._down}.bias"] = torch.cat([(bias[order] - centres) / steps, bias[rest]])
        for name in READERS:
            if f"{name}.weight" in tensors:
                up = tensors[f"{name}.weight"]
                constant = up[:, order] @ centres + up[:, dropped] @ self._table.mean[dropped]
                tensors[f"{name}.weight"] = up[:, order] * steps
                tensors[f"{name}.bias"] = tensors[f"{name}.bias"] + constant
        return tensors, segments(widths[order].tolist())


def with_equal_bits(geometry: MLAGeometry, bits: int, width: int | None = None) -> MLAGeometry:
    """Return a shape with codes of so many bits in all channels together, as if all channels deserved the same.

    Args:
        geometry: The shape with the largest rank and without codes.
        bits: Bits of the codes of one token.
        width: Bits of each channel. None takes 4, or more where all channels would have room for them; then the shape
            stands for the one that calibration will choose, whose bytes it has up to a few.
    """
    most = geometry.kv_lora_rank // GRANULE * GRANULE
    if width is None:
        enough = (one for one in reversed(WIDTHS) if one >= min(4, bits // GRANULE) and one * most >= bits)
        width = next(enough, max(WIDTHS))
    channels = min(most, max(GRANULE, bits // width // GRANULE * GRANULE))
    return replace(geometry, kv_lora_rank=channels, channel_bits=((width, channels),), sink_tokens=SINK_TOKENS)
