"""Phi-3 and Phi-4: one fused projection, rotation of some dims."""

from optimum_mla.families.spec import AttentionSpec

SPEC = AttentionSpec(
    model_type="phi3",
    class_prefix="Phi3",
    fused="qkv_proj",
)
