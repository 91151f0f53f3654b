"""Ministral: sliding windows in some layers."""

from optimum_mla.families.spec import AttentionSpec

SPEC = AttentionSpec(model_type="ministral", class_prefix="Ministral", llama_block=True)
