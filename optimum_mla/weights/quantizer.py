"""Loading and saving of HQQ and Quanto weights through the extension points of Transformers for quantizers.

The HQQ config of Transformers cannot load (`NotImplementedError`) and its Quanto config cannot save. The two methods
that are registered here do both for converted models. Importing this module imports neither library.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from optimum_mla.weights.library import StoredLibrary, make_library

METHODS = {"mla_hqq": "hqq", "mla_quanto": "quanto"}
"""The library of each `quant_method` in a checkpoint's config."""


class StoredWeightsConfig(QuantizationConfigMixin):
    """The `quantization_config` of a model whose weights HQQ or Quanto quantized.

    Args:
        quant_method: A key of `METHODS`.
        bits: Bits per code, 4 or 8.
        modules_to_not_convert: Names, or ends of names, of the linear layers that are not quantized.
    """

    def __init__(self, quant_method: str, bits: int, modules_to_not_convert: list[str], **unknown: Any) -> None:
        self.quant_method, self.bits = quant_method, bits
        self.modules_to_not_convert = list(modules_to_not_convert)


class StoredWeightsQuantizer(HfQuantizer):
    """Replaces layers before their weights are loaded; saving needs only the `state_dict` of the modules."""

    quantization_config: StoredWeightsConfig

    @property
    def library(self) -> StoredLibrary:
        return cast(StoredLibrary, make_library(METHODS[self.quantization_config.quant_method]))

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raise `MissingDependencyError` if the library is not installed."""
        _ = self.library

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        config, library = self.quantization_config, self.library
        linears = {path: module for path, module in model.named_modules() if type(module) is nn.Linear}
        for path, linear in linears.items():
            if should_convert_module(path, config.modules_to_not_convert):
                with torch.device(linear.weight.device):
                    model.set_submodule(path, library.empty(linear, config.bits).requires_grad_(False))
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        library = self.library
        for path, module in list(model.named_modules()):
            finished = library.finished(module)
            if finished is not module:
                model.set_submodule(path, finished.requires_grad_(False).train(module.training))
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Return whether adapters on the quantized layers can train."""
        return True


for _method in METHODS:
    # Transformers refuses a second registration, which a second import of the package would try.
    if _method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(_method)(StoredWeightsConfig)
        register_quantizer(_method)(StoredWeightsQuantizer)
