"""OLMo 2: query and key norms over all heads together, norms after the parts instead of before them."""

from optimum_mla.families.spec import AttentionSpec

SPEC = AttentionSpec(
    model_type="olmo2",
    class_prefix="Olmo2",
    query_bias="attention_bias",
    key_value_bias="attention_bias",
    output_bias="attention_bias",
    query_norm="q_norm",
    key_norm="k_norm",
    joint_norms=True,
    input_norm=None,
    after_attention="mlp",
)
