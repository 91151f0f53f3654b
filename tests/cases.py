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
"""Name -> class prefix and what its config changes."""

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
    prefix, own = FAMILIES[family]
    config = getattr(transformers, f"{prefix}Config")(**{**SIZES, **own, "dtype": dtype, **changes})
    # The same weights at every call, without a trace in the caller's random numbers.
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.to(dtype)


def token_ids(batch: int = 2, length: int = 24) -> Tensor:
    """Random token ids [batch, length], none of them the padding token."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(2, SIZES["vocab_size"], (batch, length), generator=generator)
