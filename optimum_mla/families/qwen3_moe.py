"""Qwen3 with experts."""

from optimum_mla.families.spec import AttentionSpec

SPEC = AttentionSpec(
    model_type="qwen3_moe",
    class_prefix="Qwen3Moe",
    query_bias="attention_bias",
    key_value_bias="attention_bias",
    output_bias="attention_bias",
    query_norm="q_norm",
    key_norm="k_norm",
)
