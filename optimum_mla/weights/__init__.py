"""Quantization of the weights of converted models by bitsandbytes, which Transformers runs, saves and loads."""

from optimum_mla.weights.choices import WEIGHT_CHOICES, bitsandbytes_config, check_weights, quantized_by
from optimum_mla.weights.measure import weight_bytes

__all__ = ["WEIGHT_CHOICES", "bitsandbytes_config", "check_weights", "quantized_by", "weight_bytes"]
