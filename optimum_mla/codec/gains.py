"""Codes with gains: a factor for each group of channels in each token, which the encoder chooses.

Latents of one token are large or small together, far more than their channels' deviations say. A gain of three bits
for each of eight groups follows them, so that the codes of the other bits are neither clipped nor all near zero. The
gain is chosen for the least error of the codes that result, not by the size of the group. Gain-shape vector
quantization (Sabin and Gray, 1984) codes sizes and shapes apart in the same way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optimum_mla.codec.codes import code_bounds
from optimum_mla.codec.constants import constant
from optimum_mla.codec.layout import GAIN_BITS, GAIN_OCTAVES, Layout

GAIN_INDICES = range(-(2 ** (GAIN_BITS - 1)), 2 ** (GAIN_BITS - 1))
"""The indices of the gains, which are codes of `GAIN_BITS` bits."""


def encode(latents: Tensor, layout: Layout, weight: Tensor) -> Tensor:
    """Return the codes of latents, [..., T, r + groups] in the dtype of `latents`, those of the gains last.

    Args:
        latents: Latents in units of their steps and about their centres, [..., T, r].
        layout: The layout of the codes.
        weight: What a unit of squared error in each channel costs, [r].
    """
    low, high = code_bounds(layout.channels, latents)
    if not layout.gain_groups:
        return (latents - 0.5).round().clamp_(low, high)
    group = constant(layout.groups, torch.int64, latents.device)
    least = latents.new_full((*latents.shape[:-1], layout.gain_groups), torch.inf)
    chosen = torch.zeros_like(least)
    for index in GAIN_INDICES:
        gain = 2.0 ** (index * GAIN_OCTAVES)
        codes = (latents / gain - 0.5).round_().clamp_(low, high)
        squares = codes.add_(0.5).mul_(gain).sub_(latents).square_().mul_(weight)
        error = torch.zeros_like(least).index_add_(-1, group, squares)
        better = error < least
        chosen.masked_fill_(better, index)
        least = torch.where(better, error, least)
    codes = (latents / _spread(chosen, layout) - 0.5).round_().clamp_(low, high)
    return torch.cat([codes, chosen], dim=-1)


def decode(codes: Tensor, layout: Layout) -> Tensor:
    """Return the latents that codes stand for, [..., T, r], in units of their steps. The codes are overwritten.

    Args:
        codes: The codes, those of the gains last, [..., T, r + groups].
        layout: The layout of the codes.
    """
    channels, groups = layout.num_channels, layout.gain_groups
    latents = codes[..., :channels].add_(0.5)
    if groups and channels % groups == 0:  # Then a view does what `_spread` copies for.
        by_group = latents.mT.unflatten(-2, (groups, -1))
        by_group.mul_(torch.exp2(codes[..., channels:] * GAIN_OCTAVES).mT.unsqueeze(-2))
    elif groups:
        latents.mul_(_spread(codes[..., channels:], layout))
    return latents


def _spread(indices: Tensor, layout: Layout) -> Tensor:
    """Return the gain of every channel, [..., T, r], by the indices of the gains of the groups, [..., T, groups]."""
    group = constant(layout.groups, torch.int64, indices.device)
    gains = torch.exp2(indices * GAIN_OCTAVES)
    # Indexed along the dimension whose numbers lie apart, so that the result has the order of the indices.
    return gains.mT.index_select(-2, group).mT
