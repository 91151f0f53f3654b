"""Arcee: Llama with another feed-forward part."""

from optimum_mla.families.spec import AttentionSpec

SPEC = AttentionSpec(
    model_type="arcee",
    class_prefix="Arcee",
    query_bias="attention_bias",
    key_value_bias="attention_bias",
    output_bias="attention_bias",
)
