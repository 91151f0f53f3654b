"""StarCoder2: biases and LayerNorms."""

from optimum_mla.families.spec import AttentionSpec

SPEC = AttentionSpec(
    model_type="starcoder2",
    class_prefix="Starcoder2",
    query_bias="use_bias",
    key_value_bias="use_bias",
    output_bias="use_bias",
)
