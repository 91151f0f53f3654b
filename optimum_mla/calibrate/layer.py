"""The measurements that a conversion makes at one layer of a calibration walk."""

from __future__ import annotations

import math
from functools import cached_property

from torch import Tensor, nn

from optimum_mla.calibrate.calibration import SAMPLE_TOKENS, Calibration
from optimum_mla.calibrate.damage import rotary_damage
from optimum_mla.calibrate.healing import refit_output
from optimum_mla.calibrate.moments import (
    FIRST_TOKENS,
    LayerMoments,
    QueryMoments,
    contribution,
    gather_moments,
    gather_query_moments,
)
from optimum_mla.calibrate.states import LayerStates
from optimum_mla.calibrate.walk import CalibrationWalk
from optimum_mla.calibrate.windows import fitted
from optimum_mla.families.project import SourceAttention
from optimum_mla.ops.ridge import Healing
from optimum_mla.ops.rope_mix import RopeMix

QUERY_TOKENS = 2048
"""Largest number of tokens, in whole windows, whose queries the axes of codes are fitted to."""


class LayerCalibration(Calibration):
    """Measurements at one layer, on the hidden states that the converted layers before it produce.

    Args:
        walk: The walk, whose states are the inputs of the layer.
        source: The layer's attention.

    Attributes:
        dtype: The dtype of the states and of the modules that are measured on them.
    """

    measures = True

    def __init__(self, walk: CalibrationWalk, source: SourceAttention) -> None:
        super().__init__(source)
        self.dtype, self._walk = walk.dtype, walk
        self._states = LayerStates(walk, source)

    @cached_property
    def moments(self) -> LayerMoments:
        """Return the second moments of the layer."""
        return gather_moments(self._states)

    @cached_property
    def query_moments(self) -> QueryMoments:
        """Return the second moments of the layer's queries, measured on at most `QUERY_TOKENS` tokens."""
        return gather_query_moments(self._states, QUERY_TOKENS)

    def inputs(self) -> Tensor:
        """Return normed inputs of some tokens, without the first ones of a window, [T, d]; see `Calibration`."""
        return self._walk.some_inputs(fitted(len(self._walk.windows)), FIRST_TOKENS, SAMPLE_TOKENS)

    def contribution(self) -> Tensor:
        """Return the 2-norm contribution of each rotary pair on the source's states, [G, D/2]; see `moments`."""
        return contribution(self._states)

    def damage(self, mix: RopeMix) -> Tensor:
        """Return the damage that is done to the logits if a component stops rotating, [C]; see `rotary_damage`."""
        return rotary_damage(self._states, mix)

    def error(self, attention: nn.Module) -> float:
        """Return the error that an attention leaves in the hidden state after it, on held-back windows.

        It is the root mean square over tokens of the error's size relative to that of the source's state; infinite if
        it is not finite.
        """
        walk = self._walk

        def sums(windows: Tensor) -> tuple[float, int]:
            states, weights = walk.converted[windows], self._states.row_weights[windows]
            squares = (walk.output(attention, states) - walk.wanted(windows)).double().square().mean(-1) * weights
            return float(squares.sum()), squares.numel()

        total, tokens = walk.processes.summed(walk.deciding_batches(), sums)
        return math.sqrt(total / tokens) if math.isfinite(total) else math.inf

    def heal(self, attention: nn.Module) -> Healing:
        """Return a refit of `attention.o_proj` to the source's hidden states; see `refit_output`."""
        return refit_output(self._walk, attention)
