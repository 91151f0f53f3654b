"""Mixtral: Mistral with experts."""

from optimum_mla.families.spec import AttentionSpec

SPEC = AttentionSpec(
    model_type="mixtral",
    class_prefix="Mixtral",
)
