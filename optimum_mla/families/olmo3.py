"""OLMo 3: OLMo 2 with sliding windows in some layers."""

from optimum_mla.families.spec import AttentionSpec

SPEC = AttentionSpec(
    model_type="olmo3",
    class_prefix="Olmo3",
    query_bias="attention_bias",
    key_value_bias="attention_bias",
    output_bias="attention_bias",
    query_norm="q_norm",
    key_norm="k_norm",
    joint_norms=True,
    input_norm=None,
    behind_attention="mlp",
)
