"""StableLM: rotation of some dims."""

from optimum_mla.families.spec import AttentionSpec

SPEC = AttentionSpec(
    model_type="stablelm",
    class_prefix="StableLm",
    query_bias="use_qkv_bias",
    key_value_bias="use_qkv_bias",
)
