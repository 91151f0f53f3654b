"""What each library that quantizes weights has to do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib import import_module

import torch
from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin

from optimum_mla.errors import MissingDependencyError

LIBRARIES: dict[str, str] = {
    "bitsandbytes": "optimum_mla.models.weights.bnb:BitsAndBytesWeights",
    "hqq": "optimum_mla.models.weights.hqq:HQQWeights",
    "quanto": "optimum_mla.models.weights.quanto:QuantoWeights",
}
"""Name of the library, which is also the extra -> `module:Class`, imported when it is first used."""


class WeightLibrary(ABC):
    """One library that quantizes the weights of linear layers; `bits` is 4 or 8 everywhere."""

    @abstractmethod
    def constraint(self, bits: int) -> str:
        """What `fits` asks for, in words."""

    @abstractmethod
    def fits(self, linear: nn.Linear, bits: int) -> bool:
        """Whether the layer's sizes can be quantized."""

    @abstractmethod
    def config(self, bits: int, skipped: list[str], dtype: torch.dtype) -> QuantizationConfigMixin:
        """The `quantization_config` of the model.

        Args:
            skipped: Names, or ends of names, of the layers that are not quantized.
            dtype: The model's, in which layers compute.
        """

    @abstractmethod
    def quantized(self, linear: nn.Linear, bits: int) -> nn.Module:
        """The layer with quantized weights, on the same device; `linear` is not to be used any more."""


class StoredLibrary(WeightLibrary):
    """A library whose loading goes through `optimum_mla.models.weights.quantizer`."""

    @abstractmethod
    def empty(self, linear: nn.Linear, bits: int) -> nn.Module:
        """A module to load a quantized layer's tensors into; `linear` gives shape, bias and dtype.

        Its `state_dict` has the names and shapes of that of `quantized`.
        """

    def finished(self, module: nn.Module) -> nn.Module:
        """What a module from `empty` becomes once its tensors are loaded; other modules stay as they are."""
        return module


def make_library(name: str) -> WeightLibrary:
    """A library of `LIBRARIES`.

    Raises:
        MissingDependencyError: It is not installed.
    """
    module, _, attribute = LIBRARIES[name].partition(":")
    try:
        return getattr(import_module(module), attribute)()
    except ImportError as error:
        raise MissingDependencyError(error.name or name, name, f"quantize weights with {name}") from error
