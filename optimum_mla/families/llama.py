"""Llama (also SmolLM, TinyLlama and every other checkpoint of `model_type: llama`)."""

from optimum_mla.families.spec import AttentionSpec

SPEC = AttentionSpec(
    model_type="llama",
    class_prefix="Llama",
    query_bias="attention_bias",
    key_value_bias="attention_bias",
    output_bias="attention_bias",
    llama_block=True,
)
