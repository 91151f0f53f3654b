"""Model families: where each keeps its attention, and the classes of its converted models.

Importing this package registers `<Family>MLAConfig` and `<Family>MLAForCausalLM` with the Transformers Auto classes,
and the quantization methods of `optimum_mla.models.weights` with its quantizers.
"""

from optimum_mla.families.spec import AttentionSpec, SourceAttention
from optimum_mla.models.registry import (
    Family,
    family_of,
    is_converted,
    register_family,
    supported_model_types,
)
from optimum_mla.models.weights import WEIGHT_CHOICES, quantize_weights, unquantized_layers, weight_bytes

__all__ = [
    "WEIGHT_CHOICES",
    "AttentionSpec",
    "Family",
    "SourceAttention",
    "family_of",
    "is_converted",
    "quantize_weights",
    "register_family",
    "supported_model_types",
    "unquantized_layers",
    "weight_bytes",
]
