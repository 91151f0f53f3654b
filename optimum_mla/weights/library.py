"""The interface of the libraries that quantize weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib import import_module

import torch
from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin

from optimum_mla.core.errors import MissingDependencyError

LIBRARIES: dict[str, str] = {
    "bitsandbytes": "optimum_mla.weights.bnb:BitsAndBytesWeights",
    "hqq": "optimum_mla.weights.hqq:HQQWeights",
    "quanto": "optimum_mla.weights.quanto:QuantoWeights",
}
"""The class of each library as `module:Class`, imported when it is first used; the names are also those of extras."""


class WeightLibrary(ABC):
    """A library that quantizes the weights of linear layers to 4 or 8 bits."""

    @abstractmethod
    def constraint(self, bits: int) -> str:
        """Return in words what `fits` requires."""

    @abstractmethod
    def fits(self, linear: nn.Linear, bits: int) -> bool:
        """Return whether the library can quantize a layer of these sizes."""

    @abstractmethod
    def config(self, bits: int, skipped: list[str], dtype: torch.dtype) -> QuantizationConfigMixin:
        """Return the `quantization_config` of a model.

        Args:
            bits: Bits per code.
            skipped: Names, or ends of names, of the layers that are not quantized.
            dtype: The dtype in which the layers compute.
        """

    @abstractmethod
    def quantized(self, linear: nn.Linear, bits: int) -> nn.Module:
        """Return the layer with quantized weights on the same device; `linear` must not be used any more."""


class StoredLibrary(WeightLibrary):
    """A library whose layers `optimum_mla.weights.quantizer` loads."""

    @abstractmethod
    def empty(self, linear: nn.Linear, bits: int) -> nn.Module:
        """Return a module for the tensors of a quantized layer, with the shape, bias and dtype of `linear`.

        Its `state_dict` has the same names and shapes as that of `quantized`.
        """

    def finished(self, module: nn.Module) -> nn.Module:
        """Return the layer for a module from `empty` whose tensors are loaded; other modules are returned unchanged."""
        return module


def make_library(name: str) -> WeightLibrary:
    """Return a library of `LIBRARIES` by its name.

    Raises:
        MissingDependencyError: The library is not installed.
    """
    module, _, attribute = LIBRARIES[name].partition(":")
    try:
        return getattr(import_module(module), attribute)()
    except ImportError as error:
        raise MissingDependencyError(error.name or name, name, f"quantize weights with {name}") from error
