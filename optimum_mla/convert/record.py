"""Records of the findings of a conversion, which a later run can take up."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from optimum_mla.core.geometry import MLAGeometry
from optimum_mla.core.processes import Processes


@dataclass(frozen=True)
class LayerResult:
    """The result of the conversion of one layer.

    Attributes:
        geometry: The layer's new shape.
        output_error: Root-mean-square error of the new attention's output relative to the source attention's, on seeded
            Gaussian states that are scaled like the layer's normed input (see `optimum_mla.convert.probe`). It compares
            layers and methods without any text, and does not replace perplexity as the measure of quality.
        predicted_error: The same error, computed from the tensors of the factorization.
        state_error: The relative error in the hidden state after the attention on held-back calibration windows, which
            includes the errors of earlier layers; None without calibration.
        healed_error: The same error after the refit of the output projection, or None without a refit.
    """

    geometry: MLAGeometry
    output_error: float
    predicted_error: float
    state_error: float | None = None
    healed_error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain values, from which `from_dict` makes an equal one."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LayerResult:
        """Return the result of which `to_dict` returned these values."""
        return cls(**{**values, "geometry": MLAGeometry(**values["geometry"])})


class Record:
    """A record of the findings of a run. This class keeps nothing; subclasses keep it where a later run can read it.

    Keys are a few words, and values are what JSON can hold. Names of tensors are a word and a number.
    """

    def known(self, key: str) -> Any:
        """Return the value that was kept under a key, or None."""
        return None

    def keep(self, key: str, value: Any) -> None:
        """Keep a value under a key."""

    def tensors(self, name: str) -> dict[str, Tensor] | None:
        """Return the tensors that were kept under a name, on the CPU, or None."""
        return None

    def keep_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Keep tensors under a name."""

    def drop_tensors(self, name: str) -> None:
        """Keep the tensors of a name no longer, if there are any."""

    def layer(self, index: int) -> tuple[dict[str, Tensor], LayerResult] | None:
        """Return the tensors of a layer's converted attention by their names in it, and its result; None if unknown."""
        return None


class SharedRecord(Record):
    """The record that the first of several processes keeps, and that all of them ask in the same order.

    Args:
        own: The record of the first process; those of the others are not used.
        processes: The processes.
    """

    def __init__(self, own: Record, processes: Processes) -> None:
        self._own, self._processes = own, processes

    def known(self, key: str) -> Any:
        return self._processes.broadcast(self._own.known(key) if self._processes.leads else None)

    def keep(self, key: str, value: Any) -> None:
        if self._processes.leads:
            self._own.keep(key, value)

    def tensors(self, name: str) -> dict[str, Tensor] | None:
        return self._processes.broadcast(self._own.tensors(name) if self._processes.leads else None)

    def keep_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        if self._processes.leads:
            self._own.keep_tensors(name, tensors)

    def drop_tensors(self, name: str) -> None:
        if self._processes.leads:
            self._own.drop_tensors(name)

    def layer(self, index: int) -> tuple[dict[str, Tensor], LayerResult] | None:
        return self._processes.broadcast(self._own.layer(index) if self._processes.leads else None)
