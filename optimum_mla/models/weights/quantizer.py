"""Loading and saving of HQQ and Quanto weights through Transformers' own extension points for quantizers.

Transformers' HQQ config does not load (`NotImplementedError`) and its Quanto config does not save. The two methods
registered here do both, for converted models. Importing this module imports neither library.
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

from optimum_mla.models.weights.library import StoredLibrary, make_library

METHODS = {"mla_hqq": "hqq", "mla_quanto": "quanto"}
"""`quant_method` in a checkpoint's config -> the library."""


class StoredWeightsConfig(QuantizationConfigMixin):
    """What `config.json` says of weights quantized by HQQ or Quanto.

    Args:
        quant_method: A key of `METHODS`.
        bits: Bits of a code, 4 or 8.
        modules_to_not_convert: Names, or ends of names, of the linear layers that are not quantized.
    """

    def __init__(self, quant_method: str, bits: int, modules_to_not_convert: list[str], **unknown: Any) -> None:
        self.quant_method, self.bits = quant_method, bits
        self.modules_to_not_convert = list(modules_to_not_convert)


class StoredWeightsQuantizer(HfQuantizer):
    """Swaps layers before their weights are loaded; saving needs nothing beyond the modules' `state_dict`."""

    quantization_config: StoredWeightsConfig

    @property
    def library(self) -> StoredLibrary:
        return cast(StoredLibrary, make_library(METHODS[self.quantization_config.quant_method]))

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raises `MissingDependencyError` where the library is not installed."""
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
        """Whether adapters on the quantized layers train."""
        return True


for _method in METHODS:
    # A second import of the package must not fail.
    if _method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(_method)(StoredWeightsConfig)
        register_quantizer(_method)(StoredWeightsQuantizer)
