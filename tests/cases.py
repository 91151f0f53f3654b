"""The one matrix: families of tiny source models, and the methods. A new family or method adds a row here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from optimum_mla import GQA2MLA, MHA2MLA, MLATransformation, XEcoMLA
from optimum_mla.pipeline import TextOptions

UNCALIBRATED = TextOptions(uncalibrated=True, eval_samples=1, eval_length=16)
"""Conversions as in the papers, which are quick, measured on a few words."""

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama with biases": ("Llama", {"attention_bias": True}),
    "llama with scaled rope": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama with yarn": ("Llama", {"rope_parameters": YARN_ROPE}),
    "llama multi-head, tied": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral with a window": ("Mistral", {"sliding_window": 8}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "qwen3 with biases": ("Qwen3", {"attention_bias": True}),
}
"""Name -> class prefix and what its config changes. Every method and mode is tested on these."""

WINDOWS: dict[str, Any] = {
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MULTIPLIERS = {
    "attention_multiplier": 0.5,
    "residual_multiplier": 0.22,
    "embedding_multiplier": 12.0,
    "logits_scaling": 0.125,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [2.0, 2.1, 2.2, 2.3, 2.4, 2.5],
    "original_max_position_embeddings": 64,
    "factor": 2.0,
}
FURTHER_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "arcee": ("Arcee", {"attention_bias": True}),
    "cohere": ("Cohere", {"logit_scale": 0.5}),
    "gemma": ("Gemma", {}),
    "gemma2": (
        "Gemma2",
        {**WINDOWS, "query_pre_attn_scalar": 64, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    ),
    "gemma3_text": ("Gemma3Text", {**WINDOWS, "query_pre_attn_scalar": 64}),
    "glm4": ("Glm4", {"attention_bias": True}),
    "gpt_neox": ("GPTNeoX", {"num_key_value_heads": 4}),
    "gpt_neox, one part after the other": ("GPTNeoX", {"num_key_value_heads": 4, "use_parallel_residual": False}),
    "granite": ("Granite", MULTIPLIERS),
    "granitemoe": ("GraniteMoe", {**MULTIPLIERS, "num_local_experts": 4}),
    "helium": ("Helium", {}),
    "ministral": ("Ministral", WINDOWS),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": None}),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", WINDOWS),
    "phi3": ("Phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}}),
    "phi3 with longrope": ("Phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}),
    "qwen2_moe": ("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 16}),
    "qwen3_moe": ("Qwen3Moe", EXPERTS),
    "seed_oss": ("SeedOss", {"attention_out_bias": True}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1]}),
    "stablelm": ("StableLm", {"use_qkv_bias": True}),
    "stablelm, parts beside each other": ("StableLm", {"use_parallel_residual": True}),
    "starcoder2": ("Starcoder2", {"sliding_window": None}),
}
"""Further families, on which `tests/families/test_matrix.py` runs the methods and forms."""

METHODS: dict[str, Callable[[Tensor], MLATransformation]] = {
    "gqa2mla full rank": lambda ids: GQA2MLA(),
    "gqa2mla half": lambda ids: GQA2MLA(kv_cache_ratio=0.5),
    "gqa2mla energy": lambda ids: GQA2MLA(energy=0.8),
    "mha2mla joint": lambda ids: MHA2MLA(kv_cache_ratio=0.5, rope_selection="high"),
    "mha2mla split": lambda ids: MHA2MLA(kv_cache_ratio=0.5, factorization="split", rope_selection="low"),
    "gqa2mla rebuilt": lambda ids: GQA2MLA(kv_cache_ratio=0.5, calibration=ids),
    "gqa2mla cached": lambda ids: GQA2MLA(kv_cache_ratio=0.75, rope_cache="cached", calibration=ids),
    "gqa2mla one latent": lambda ids: GQA2MLA(kv_cache_ratio=0.5, positional="full", calibration=ids),
    "mha2mla contribution": lambda ids: MHA2MLA(
        d_kv=8, qk_rope_head_dim=6, rope_selection="contribution", factorization="joint", calibration=ids
    ),
    "mha2mla calibrated": lambda ids: MHA2MLA(kv_cache_ratio=0.5, calibration=ids),
    "x-ecomla": lambda ids: XEcoMLA(kv_cache_ratio=0.5),
    "x-ecomla as printed": lambda ids: XEcoMLA(kv_lora_rank=24, rope_selection="last", q_lora_rank=40),
    "x-ecomla norm, energy": lambda ids: XEcoMLA(energy=0.8, q_energy=0.9, latent_norm=True, calibration=ids),
    "x-ecomla hybrid": lambda ids: XEcoMLA(kv_cache_ratio=0.5, layers=[0, 2]),
}
"""Name -> the transformation, given calibration tokens."""


def source_model(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A source model with random weights in which nothing is zero or one: biases and gains are random too."""
    prefix, own = (FAMILIES | FURTHER_FAMILIES)[family]
    config = getattr(transformers, f"{prefix}Config")(**{**SIZES, **own, "dtype": dtype, **changes})
    causal_lm = f"{prefix.removesuffix('Text')}ForCausalLM"
    # The same weights at every call, without a trace in the caller's random numbers.
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        model = getattr(transformers, causal_lm)(config).eval()
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.to(dtype)


def token_ids(batch: int = 2, length: int = 24) -> Tensor:
    """Random token ids [batch, length], none of them the padding token."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(2, SIZES["vocab_size"], (batch, length), generator=generator)
