"""SmolLM3: every fourth layer has no positions."""

from optimum_mla.families.spec import AttentionSpec

SPEC = AttentionSpec(
    model_type="smollm3",
    class_prefix="SmolLM3",
    query_bias="attention_bias",
    key_value_bias="attention_bias",
    output_bias="attention_bias",
    rotating_layers="no_rope_layers",
    llama_block=True,
)
