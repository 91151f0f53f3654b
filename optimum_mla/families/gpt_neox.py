"""GPT-NeoX (also Pythia): multi-head attention with one fused projection, rotation of some dims."""

from optimum_mla.families.spec import AttentionSpec

SPEC = AttentionSpec(
    model_type="gpt_neox",
    class_prefix="GPTNeoX",
    query_bias="attention_bias",
    key_value_bias="attention_bias",
    output_bias="attention_bias",
    base="gpt_neox",
    attention="attention",
    embedding="embed_in",
    norm="final_layer_norm",
    output="dense",
    fused="query_key_value",
    fused_by_head=True,
)
