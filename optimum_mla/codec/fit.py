"""Steps of codes, and the errors that codes of each width leave, from samples of the latents."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optimum_mla.core.segments import GRANULE, WIDTHS

GAUSSIAN_STEPS = {1: 1.596, 2: 0.9957, 3: 0.586, 4: 0.3352, 5: 0.1881, 6: 0.1041, 8: 0.0308}
"""Steps of uniform codes with the least squared error on a normal distribution of deviation 1, by bits."""
STEP_FACTORS = (0.6, 0.75, 0.9, 1.05, 1.25, 1.5, 1.8, 2.2)
"""Steps that are tried, as multiples of those. Heavier tails need larger ones."""
MARGIN = 1.1
"""Factor by which the best steps are widened. The latents of other texts are larger than those of the calibration text,
and clipping would cost them more than rounding does."""


@dataclass(frozen=True)
class CodeTable:
    """The codes of each width that leave the least squared error in each channel.

    Attributes:
        errors: Weighted squared error of each channel by bits, from 0 to 8, [r, 9]; infinite where no code has so many
            bits. With 0 bits a channel is replaced by zero.
        steps: The steps, [r, 9]; 0 for a channel that is always zero.
    """

    errors: Tensor
    steps: Tensor

    @classmethod
    def fit(cls, samples: Tensor, weights: Tensor, gains: Tensor | None = None) -> CodeTable:
        """Return the table for samples of the latents, which are about zero.

        The clip, and so the step, is the one with the least mean squared error, not the one that spans the range, and
        wider by `MARGIN`.

        Args:
            samples: Latents of tokens that are to be coded, [T, r].
            weights: Cost of a unit of squared error in each channel, [r].
            gains: The factor by which a token's steps are larger than the channel's, [T, r]; None for one everywhere.
        """
        centred = samples.float()
        factors = centred.new_ones(1, 1) if gains is None else gains
        deviation = (centred / factors).square().mean(0).sqrt()
        varies = deviation > torch.finfo(torch.float32).tiny ** 0.5  # Squares of smaller numbers leave float32.
        errors = torch.full((len(weights), max(WIDTHS) + 1), torch.inf, dtype=torch.float64, device=samples.device)
        steps = torch.zeros_like(errors)
        errors[:, 0] = weights * torch.where(varies, centred.double().square().mean(0), 0.0)
        for bits in WIDTHS:
            best = torch.full_like(deviation, torch.inf)
            for factor in STEP_FACTORS:
                step = factor * GAUSSIAN_STEPS[bits] * deviation
                error = _squared_error(centred, step * factors, bits)
                steps[:, bits] = torch.where(error < best, MARGIN * step.double(), steps[:, bits])
                best = torch.minimum(best, error)
            steps[:, bits] = torch.where(varies, steps[:, bits], 0.0)
            left = _squared_error(centred, steps[:, bits].float() * factors, bits).double()
            errors[:, bits] = torch.where(varies, weights * left, 0.0)
        return cls(errors, steps)


def _squared_error(centred: Tensor, step: Tensor, bits: int) -> Tensor:
    """Return the mean squared error of codes of each channel, [r], for steps [1 or T, r]."""
    half = 2 ** (bits - 1)
    # Codes stand for odd multiples of half a step, so that the range is symmetric.
    codes = (centred / step - 0.5).round_().clamp_(-half, half - 1)
    return codes.add_(0.5).mul_(step).sub_(centred).square_().mean(0)


def allocate_bits(errors: Tensor, budget: int) -> Tensor:
    """Return the bits of each channel that make the sum of errors least within a budget, [r].

    Groups of `GRANULE` neighbouring channels get the same bits, so channels should be sorted by energy. Bits go where
    the error falls most per bit, along the lower convex hull of each group's errors, which is the Lagrangian optimum.
    What is left of the budget goes to the steps that still fit.

    Args:
        errors: Squared error of each channel by bits, [r, 9]; see `CodeTable`.
        budget: Largest number of bits of a token's codes.
    """
    whole = len(errors) // GRANULE * GRANULE
    curves = errors[:whole].unflatten(0, (-1, GRANULE)).sum(1).tolist()
    steps = [step for group, curve in enumerate(curves) for step in _hull_steps(group, curve)]
    widths, left, blocked = [0] * len(curves), budget, set()
    for _, group, low, high in sorted(steps, key=lambda step: (-step[0], step[1], step[2])):
        cost = GRANULE * (high - low)
        if group in blocked or cost > left:
            blocked.add(group)  # A group cannot take a later step without this one.
            continue
        widths[group], left = high, left - cost
    channels = torch.zeros(len(errors), dtype=torch.long, device=errors.device)
    channels[:whole] = torch.tensor(widths, dtype=torch.long, device=errors.device).repeat_interleave(GRANULE)
    return channels


def _hull_steps(group: int, curve: list[float]) -> list[tuple[float, int, int, int]]:
    """Return the steps along the lower convex hull of a curve: fall per bit, group, bits before and after."""
    found: list[tuple[float, int, int, int]] = []
    low = 0
    while True:
        further = [
            ((curve[low] - curve[high]) / (high - low), group, low, high)
            for high in range(low + 1, len(curve))
            if curve[high] < curve[low]
        ]
        if not further:
            return found
        found.append(max(further))
        low = found[-1][3]
