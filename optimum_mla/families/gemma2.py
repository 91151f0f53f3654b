"""Gemma 2: soft-capped logits, sliding windows in every second layer, further norms after the parts."""

from optimum_mla.families.spec import AttentionSpec

SPEC = AttentionSpec(
    model_type="gemma2",
    class_prefix="Gemma2",
    query_bias="attention_bias",
    key_value_bias="attention_bias",
    output_bias="attention_bias",
    norm_offset=1.0,
    logit_cap="attn_logit_softcapping",
    head_cap="final_logit_softcapping",
    after_attention="pre_feedforward_layernorm",
)
