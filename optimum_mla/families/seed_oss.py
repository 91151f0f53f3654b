"""Seed-OSS: biases on queries, keys and values."""

from optimum_mla.families.spec import AttentionSpec

SPEC = AttentionSpec(
    model_type="seed_oss",
    class_prefix="SeedOss",
    query_bias="attention_bias",
    key_value_bias="attention_bias",
    output_bias="attention_out_bias",
    llama_block=True,
)
