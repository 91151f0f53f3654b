"""Model families: where each keeps its attention, and the classes of its converted models.

Importing this package registers `<Family>MLAConfig` and `<Family>MLAForCausalLM` with the Transformers Auto classes.
"""

from optimum_mla.families.project import SourceAttention
from optimum_mla.families.spec import AttentionSpec
from optimum_mla.models.family_table import Family, family_of, is_converted, supported_model_types
from optimum_mla.models.registry import register_family
from optimum_mla.models.wrappers import language_model

__all__ = [
    "AttentionSpec",
    "Family",
    "SourceAttention",
    "family_of",
    "is_converted",
    "language_model",
    "register_family",
    "supported_model_types",
]
