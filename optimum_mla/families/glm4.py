"""GLM-4: neighbouring dims turn together, in half of a head."""

from optimum_mla.families.spec import AttentionSpec

SPEC = AttentionSpec(
    model_type="glm4",
    class_prefix="Glm4",
    query_bias="attention_bias",
    key_value_bias="attention_bias",
    interleaved=True,
)
