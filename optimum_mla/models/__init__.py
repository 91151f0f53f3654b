"""Model families: where each keeps its attention, and the classes of its converted models.

Importing this package registers `<Family>MLAConfig` and `<Family>MLAForCausalLM` with the Transformers Auto classes.
"""

from optimum_mla.models.registry import (
    Family,
    family_of,
    is_converted,
    register_family,
    supported_model_types,
)
from optimum_mla.models.spec import AttentionSpec, SourceAttention

__all__ = [
    "AttentionSpec",
    "Family",
    "SourceAttention",
    "family_of",
    "is_converted",
    "register_family",
    "supported_model_types",
]
