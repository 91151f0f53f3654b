"""Qwen2 with experts."""

from optimum_mla.families.spec import AttentionSpec

SPEC = AttentionSpec(
    model_type="qwen2_moe",
    class_prefix="Qwen2Moe",
    query_bias="qkv_bias",
    key_value_bias="qkv_bias",
)
