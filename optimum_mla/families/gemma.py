"""Gemma: norms multiply by one plus their weight."""

from optimum_mla.families.spec import AttentionSpec

SPEC = AttentionSpec(
    model_type="gemma",
    class_prefix="Gemma",
    query_bias="attention_bias",
    key_value_bias="attention_bias",
    output_bias="attention_bias",
    norm_offset=1.0,
)
