"""Granite with experts."""

from optimum_mla.families.spec import AttentionSpec

SPEC = AttentionSpec(
    model_type="granitemoe",
    class_prefix="GraniteMoe",
    query_bias="attention_bias",
    key_value_bias="attention_bias",
    output_bias="attention_bias",
    embedding_factor="embedding_multiplier",
    head_divisor="logits_scaling",
)
