"""Qwen2 and Qwen2.5: biases on queries, keys and values."""

from optimum_mla.families.spec import AttentionSpec

SPEC = AttentionSpec(model_type="qwen2", class_prefix="Qwen2", query_bias=True, key_value_bias=True, llama_block=True)
