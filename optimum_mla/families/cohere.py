"""Cohere (Command R): neighbouring dims turn together, the feed-forward part runs beside the attention."""

from optimum_mla.families.spec import AttentionSpec

SPEC = AttentionSpec(
    model_type="cohere",
    class_prefix="Cohere",
    query_bias="attention_bias",
    key_value_bias="attention_bias",
    output_bias="attention_bias",
    interleaved=True,
    interleaved_table=True,
    head_factor="logit_scale",
    after_attention=None,
)
