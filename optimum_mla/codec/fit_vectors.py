"""The codec of one layer, fitted to vectors that the layer caches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optimum_mla.codec.codes import zero_points
from optimum_mla.codec.constants import constant
from optimum_mla.codec.fit import MARGIN, CodeTable, allocate_bits
from optimum_mla.codec.gains import GAIN_INDICES, decode, encode
from optimum_mla.codec.layout import GAIN_BITS, GAIN_GROUPS, GAIN_OCTAVES, Layout, groups_of
from optimum_mla.codec.vectors import VectorCodec
from optimum_mla.core.segments import GRANULE, WIDTHS, segments

ALLOCATIONS = 2
"""How often bits are shared out anew with the gains of the channels that have bits."""
REFITS = 3
"""How often the steps of a codec are fitted again to the gains that the encoder chooses."""
STEP_CHANGES = (0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.35)
"""Factors of the steps that are tried in each of these."""


@dataclass(frozen=True)
class Axes:
    """The axes of the latent of one layer.

    Attributes:
        down: The factor that reads a vector, [r, w] float64.
        up: The factor that reads the latent, [w, r] float64.
        costs: What a unit of squared error in each channel costs, [r]. Errors of different channels add up.
    """

    down: Tensor
    up: Tensor
    costs: Tensor


class VectorFit:
    """Fits codecs to vectors of one layer.

    Args:
        axes: The axes of the latent, with falling energies.
        vectors: Vectors of tokens that are to be coded, [T, w].
        size: About how many bytes the codes of a token will have. The errors of channels are measured with the gains of
            those that have bits then.
        gain_groups: Number of groups of channels with gains, 0 or a multiple of `GRANULE`.
        table: The table that a fit to the same arguments found; None fits it.

    Attributes:
        axes: The axes of the latent.
    """

    def __init__(
        self,
        axes: Axes,
        vectors: Tensor,
        size: int,
        gain_groups: int = GAIN_GROUPS,
        table: CodeTable | None = None,
    ) -> None:
        self.axes, self._groups = axes, gain_groups
        self._centre = vectors.double().mean(0)
        self._latents = ((vectors.double() - self._centre) @ axes.down.T).float()  # [T, r], about zero
        if table is not None:
            self._errors, self._steps = table.errors, table.steps
            return
        table = CodeTable.fit(self._latents, axes.costs)
        self._errors, self._steps = table.errors, table.steps
        for _ in range(ALLOCATIONS if gain_groups else 0):
            order = _by_bits(self._widths(size))
            kept = self._latents[:, order]
            gained = CodeTable.fit(kept, axes.costs[order], gains=self._gains_by_size(kept))
            self._errors, self._steps = table.errors.clone(), table.steps.clone()
            self._errors[order], self._steps[order] = gained.errors, gained.steps

    @property
    def table(self) -> CodeTable:
        """Return the errors and steps of all channels with the gains of those that have bits."""
        return CodeTable(self._errors, self._steps)

    def _widths(self, size: int) -> Tensor:
        """Return the bits of all channels, [r], for so many bytes. Some channels get a bit if none is worth any."""
        widths = allocate_bits(self._errors, 8 * size - GAIN_BITS * self._groups)
        if not widths.any():
            widths[:GRANULE] = min(WIDTHS)
        return widths

    def error(self, size: int) -> float:
        """Return about what weighted squared error codes of so many bytes a token leave."""
        return float(self._errors.gather(1, self._widths(size)[:, None]).sum())

    def codec(self, size: int, refits: int = REFITS) -> VectorCodec:
        """Return the codec with at most so many bytes a token.

        Args:
            size: Bytes of one token's codes. They have to hold the gains and eight channels of one bit.
            refits: How often the steps are fitted again to the gains that the encoder chooses.
        """
        widths = self._widths(size)
        order = _by_bits(widths)
        layout = Layout(segments(widths[order].tolist()), self._groups)
        steps = self._steps.gather(1, widths[:, None])[order, 0].float()
        costs, kept = self.axes.costs[order].float(), self._latents[:, order]
        if self._groups:
            steps = steps / MARGIN
            for _ in range(refits):
                steps = _refitted(kept, steps, costs, layout)
            steps = steps * MARGIN
        units = torch.where(steps > 0, 1 / steps, 0.0)
        weight = costs * steps.square()
        return VectorCodec(
            layout,
            (units[:, None] * self.axes.down[order]).float(),
            (self.axes.up[:, order] * steps).float(),
            self._centre.float(),
            weight / weight.mean().clamp_min(torch.finfo(torch.float32).tiny),
        )

    def _gains_by_size(self, latents: Tensor) -> Tensor:
        """Return the gains that follow the size of each group, [T, r]; the encoder's come near to them."""
        channels = latents.shape[1]
        group = constant(groups_of(channels, self._groups), torch.int64, latents.device)
        size = latents.square() / latents.square().mean(0).clamp_min(torch.finfo(torch.float32).tiny)
        summed = latents.new_zeros(len(latents), self._groups).index_add_(1, group, size)
        mean = summed / torch.bincount(group, minlength=self._groups)
        index = mean.clamp_min(torch.finfo(torch.float32).tiny).log2() / 2 / GAIN_OCTAVES
        return torch.exp2(index.round().clamp(GAIN_INDICES[0], GAIN_INDICES[-1]) * GAIN_OCTAVES)[:, group]


def _by_bits(widths: Tensor) -> Tensor:
    """Return the indices of the channels that have bits, those with more bits first."""
    order = widths.argsort(descending=True, stable=True)
    return order[widths[order] > 0]


def _refitted(latents: Tensor, steps: Tensor, costs: Tensor, layout: Layout) -> Tensor:
    """Return steps that leave less error with the gains that the encoder chooses with the given ones, [r]."""
    units = torch.where(steps > 0, 1 / steps, 0.0)
    chosen = encode(latents * units, layout, costs * steps.square())
    half = constant(zero_points(layout.channels), torch.float32, latents.device)
    gains = decode(torch.cat([torch.zeros_like(latents), chosen[:, layout.num_channels :]], dim=1), layout) * 2
    least, best = torch.full_like(steps, torch.inf), steps
    for change in STEP_CHANGES:
        step = gains * (change * steps)
        codes = torch.minimum(torch.maximum((latents / step - 0.5).round_(), -half), half - 1)
        error = codes.add_(0.5).mul_(step).sub_(latents).square_().mean(0)
        best = torch.where(error < least, change * steps, best)
        least = torch.minimum(least, error)
    return best
