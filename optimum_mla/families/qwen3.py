"""Qwen3: an RMSNorm on every query and key head, before the rotation."""

from optimum_mla.families.spec import AttentionSpec

SPEC = AttentionSpec(
    model_type="qwen3",
    class_prefix="Qwen3",
    query_bias="attention_bias",
    key_value_bias="attention_bias",
    output_bias="attention_bias",
    query_norm="q_norm",
    key_norm="k_norm",
    llama_block=True,
)
