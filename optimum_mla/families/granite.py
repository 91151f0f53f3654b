"""Granite: multipliers on embeddings, scores, residual branches and logits."""

from optimum_mla.families.spec import AttentionSpec

SPEC = AttentionSpec(
    model_type="granite",
    class_prefix="Granite",
    query_bias="attention_bias",
    key_value_bias="attention_bias",
    output_bias="attention_bias",
    embedding_factor="embedding_multiplier",
    head_divisor="logits_scaling",
)
