"""The language model of Gemma 3: query and key norms, other frequencies in the layers with sliding windows."""

from optimum_mla.families.spec import AttentionSpec

SPEC = AttentionSpec(
    model_type="gemma3_text",
    class_prefix="Gemma3",
    text_prefix="Gemma3Text",
    module="gemma3",
    query_bias="attention_bias",
    key_value_bias="attention_bias",
    output_bias="attention_bias",
    query_norm="q_norm",
    key_norm="k_norm",
    norm_offset=1.0,
    head_cap="final_logit_softcapping",
    after_attention="pre_feedforward_layernorm",
)
