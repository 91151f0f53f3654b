"""The pass over the source in which the choices for all layers together are made, before the first one is converted."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from optimum_mla.calibrate.sensitivity import Sensitivity
from optimum_mla.calibrate.walk import CalibrationWalk
from optimum_mla.convert.search import LayerSearch
from optimum_mla.core.processes import Processes
from optimum_mla.models import SourceAttention
from optimum_mla.models.layer_source import LayerSource

ALLOCATION_WINDOWS = 16
"""Largest number of windows that the pass takes of the calibration text. Errors are only compared with each other
there."""


class FirstPass:
    """Searches of the layers in order, on the states of the source, or by statistics.

    Args:
        source: The layers of the model.
        tokens: The calibration tokens, [N, L], or None with statistics.
        make_search: Returns the search of a layer, given the walk and the layer.
        processes: The processes that share the work.
    """

    def __init__(
        self,
        source: LayerSource,
        tokens: Tensor | None,
        make_search: Callable[[CalibrationWalk | None, int, SourceAttention], LayerSearch | None],
        processes: Processes,
    ) -> None:
        self._source, self._tokens, self._make_search, self._processes = source, tokens, make_search, processes
        self._sensitivity: Sensitivity | None = None
        self._walk: CalibrationWalk | None = None

    def search(self, layer: int) -> LayerSearch:
        """Return the search of a layer; the layers are asked for in order, and some may be left out."""
        if self._tokens is not None:
            if self._walk is None or self._sensitivity is None:
                tokens = self._tokens[:: -(-len(self._tokens) // ALLOCATION_WINDOWS)]
                self._walk = CalibrationWalk(self._source, tokens, self._processes)
                self._sensitivity = Sensitivity(self._walk)
            while self._walk.layer < layer:
                self._sensitivity.advance()
        found = self._make_search(self._walk, layer, self._source.attention(layer))
        if found is None:
            raise RuntimeError("a first pass without calibration")
        return found

    def replace(self, attention: nn.Module) -> None:
        """Let `divergences` tell what another attention in the layer that was searched last does to predictions."""
        if self._sensitivity is None:
            raise RuntimeError("a first pass without tokens")
        self._sensitivity.replace(attention)

    def divergences(self, title: str) -> dict[int, float]:
        """Return the divergence of the predictions for each replaced attention, by layer; see `Sensitivity`."""
        return {} if self._sensitivity is None else self._sensitivity.divergences(title)
