"""Helium: neighbouring dims turn together."""

from optimum_mla.families.spec import AttentionSpec

SPEC = AttentionSpec(
    model_type="helium",
    class_prefix="Helium",
    query_bias="attention_bias",
    key_value_bias="attention_bias",
    interleaved=True,
    llama_block=True,
)
