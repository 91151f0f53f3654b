"""The specification of codes with gains: one token and one channel at a time, in the simplest form."""

from __future__ import annotations

import torch
from torch import Tensor

from optimum_mla.codec.layout import GAIN_BITS, GAIN_OCTAVES, Layout


def encode(latents: Tensor, layout: Layout, weight: Tensor) -> Tensor:
    """Return the codes of latents, [T, r + groups], those of the gains last.

    Each gain is the one whose codes leave the least weighted squared error in its group; of equal ones the smallest.

    Args:
        latents: Latents in units of their steps and about their centres, [T, r].
        layout: The layout of the codes.
        weight: What a unit of squared error in each channel costs, [r].
    """
    halves = [2 ** (bits - 1) for bits, count in layout.channels for _ in range(count)]
    found = torch.zeros(len(latents), layout.num_channels + layout.gain_groups)
    for token, latent in enumerate(latents.float()):
        for group in range(max(1, layout.gain_groups)):
            of = [
                channel for channel in range(len(halves)) if not layout.gain_groups or layout.groups[channel] == group
            ]
            least = float("inf")
            for index in range(-(2 ** (GAIN_BITS - 1)), 2 ** (GAIN_BITS - 1)) if layout.gain_groups else [0]:
                gain, error, codes = 2.0 ** (index * GAIN_OCTAVES), 0.0, []
                for channel in of:
                    scaled = float(latent[channel]) / gain
                    code = min(max(round(scaled - 0.5), -halves[channel]), halves[channel] - 1)
                    error += float(weight[channel]) * (gain * (code + 0.5) - float(latent[channel])) ** 2
                    codes.append(code)
                if error < least:
                    least = error
                    found[token, of] = torch.tensor(codes, dtype=torch.float32)
                    if layout.gain_groups:
                        found[token, layout.num_channels + group] = index
    return found


def decode(codes: Tensor, layout: Layout) -> Tensor:
    """Return the latents that codes [T, r + groups] stand for, [T, r], in units of their steps."""
    found = torch.zeros(len(codes), layout.num_channels)
    for token, row in enumerate(codes.tolist()):
        for channel in range(layout.num_channels):
            index = row[layout.num_channels + layout.groups[channel]] if layout.gain_groups else 0
            found[token, channel] = 2.0 ** (index * GAIN_OCTAVES) * (row[channel] + 0.5)
    return found
