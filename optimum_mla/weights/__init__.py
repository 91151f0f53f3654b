"""Quantization of the weights of converted models by bitsandbytes, HQQ or Quanto, with saving and loading."""

from optimum_mla.weights import quantizer as quantizer
from optimum_mla.weights.choices import WEIGHT_CHOICES, check_weights, quantize_weights, unquantized_layers
from optimum_mla.weights.measure import weight_bytes

__all__ = ["WEIGHT_CHOICES", "check_weights", "quantize_weights", "unquantized_layers", "weight_bytes"]
