"""Search for a layer's shape and its errors by rank, by measuring candidates."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from optimum_mla.calibrate.calibration import Calibration
from optimum_mla.calibrate.layer import LayerCalibration
from optimum_mla.calibrate.statistics import StoredCalibration
from optimum_mla.convert.method import ConversionMethod
from optimum_mla.core.errors import InvalidValueError
from optimum_mla.core.geometry import MLAGeometry
from optimum_mla.models import SourceAttention
from optimum_mla.models.assemble import load_attention
from optimum_mla.models.layer_source import LayerSource, for_walking
from optimum_mla.nn import LatentAttention
from optimum_mla.ops.low_rank import rank_for_energy
from optimum_mla.plan.allocation import fit_power_law, rank_range

GOOD_ENOUGH = 1.02
"""A cheaper shape is preferred if its error is within this factor of the least error."""


@dataclass
class LayerSearch:
    """Tries conversions of one layer and compares their errors on held-back windows, or predicts these errors.

    Attributes:
        method: The transformation that converts the layer.
        model: The layers of the model.
        layer: Index of the layer.
        source: The layer's attention.
        calibration: Measurements at the layer.
    """

    method: ConversionMethod
    model: LayerSource
    layer: int
    source: SourceAttention
    calibration: Calibration
    _modules: dict[MLAGeometry, LatentAttention] = field(default_factory=dict)
    """A module for each shape, with the weights of the last candidate, because making modules takes long."""

    def convert(self, geometry: MLAGeometry) -> tuple[MLAGeometry, dict[str, Tensor]]:
        """Return the layer's shape and tensors."""
        return geometry, self.method.convert_layer(self.source, geometry, self.calibration)

    def attention(self, geometry: MLAGeometry, tensors: dict[str, Tensor]) -> LatentAttention:
        """Return the layer's attention as a module in the dtype of the calibration, causal if it gets no mask.

        A later call for the same shape gives other weights to the same module.
        """
        dtype = self._measuring.dtype
        cast = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
        if geometry in self._modules:
            self._modules[geometry].load_state_dict(cast, assign=True)
        else:
            source = self.model
            made = load_attention(source.family, source.config, self.layer, cast, source.rotary, geometry)
            self._modules[geometry] = for_walking(made, source.implementation)
        return self._modules[geometry]

    @property
    def _measuring(self) -> LayerCalibration:
        if not isinstance(self.calibration, LayerCalibration):
            raise InvalidValueError(
                "qk_rope_head_dim",
                None,
                f"a number for {self.method.name} with statistics",
                "Give one, or calibrate on text: without it nothing can be measured.",
            )
        return self.calibration

    def error(self, geometry: MLAGeometry) -> float:
        """Return the error that the given shape leaves on the held-back windows.

        Raises:
            InvalidValueError: The calibration has no windows to measure on.
        """
        return self._measuring.error(self.attention(*self.convert(geometry)))

    def squared_error(self, geometry: MLAGeometry) -> float:
        """Return the squared error that a shape leaves, predicted if the method can, and measured otherwise."""
        predicted = self.method.predicted_error(self.source, geometry, self.calibration)
        return self.error(geometry) ** 2 if predicted is None else predicted

    def best_shape(self, geometry: MLAGeometry) -> MLAGeometry:
        """Return the cheapest of the method's candidates whose error is within `GOOD_ENOUGH` of the least error.

        Errors are predicted where the method has a closed form for them, and measured otherwise. Under an energy
        budget, the rank is then set from the weighted energies.
        """
        candidates, energy = self.method.candidates(self.source, geometry), self.method.budget.energy
        errors: list[float] = []
        for candidate in candidates if len(candidates) > 1 else []:
            predicted = self.method.predicted_error(self.source, candidate, self.calibration)
            errors.append(self.error(candidate) ** 2 if predicted is None else predicted)
            if predicted is None and errors[-1] > GOOD_ENOUGH**2 * min(errors):
                break  # The error is taken to rise from here on.
        good = GOOD_ENOUGH**2 * min(errors, default=0.0)
        best = next((shape for shape, error in zip(candidates, errors, strict=False) if error <= good), candidates[0])
        if energy is not None:
            energies = self.method.problem(self.source, best, self.calibration).energies
            best = replace(best, kv_lora_rank=rank_for_energy(energies.sqrt(), energy))
        return best

    @torch.no_grad()
    def rank_curve(self, geometry: MLAGeometry, by: str) -> dict[int, float]:
        """Return squared errors by rank.

        Args:
            geometry: Shape of the layer.
            by: `energy` for the lost share of the weighted energy at every rank, or `error` for squared errors in the
                hidden state at the ranks of `rank_range`, of which the first and the last are measured where the
                calibration can.
        """
        problem = self.method.problem(self.source, geometry, self.calibration)
        largest = len(problem.energies)
        if by == "energy":
            total = problem.error(0) or 1.0
            return {rank: problem.error(rank) / total for rank in range(1, largest + 1)}
        low, high = rank_range(geometry.kv_lora_rank, largest)
        if isinstance(self.calibration, StoredCalibration):
            weight = self.calibration.state_weight
            return {rank: weight * problem.error(rank) for rank in range(low, high + 1)}
        measured = {rank: self.error(replace(geometry, kv_lora_rank=rank)) ** 2 for rank in {low, high}}
        predicted = {rank: problem.error(rank) for rank in range(low, high + 1)}
        return fit_power_law(predicted, measured)
