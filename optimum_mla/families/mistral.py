"""Mistral: no biases, a sliding window on every layer where the config names one."""

from optimum_mla.families.spec import AttentionSpec

SPEC = AttentionSpec(model_type="mistral", class_prefix="Mistral", llama_block=True)
