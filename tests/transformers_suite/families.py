"""Families and attention forms that the tests of Transformers run on, as tiny configs of two layers."""

from __future__ import annotations

from typing import Any, Literal

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from optimum_mla import models

Kind = Literal["Model", "ForCausalLM"]
KINDS: tuple[Kind, ...] = ("Model", "ForCausalLM")
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FURTHER_FAMILIES: dict[str, dict[str, Any]] = {
    "Arcee": {},
    "Cohere": {},
    "Gemma": {},
    "Gemma2": {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    "Gemma3": {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    "Glm4": {},
    "Granite": {"residual_multiplier": 0.5, "logits_scaling": 2.0},
    "GraniteMoe": {"num_local_experts": 4},
    "Helium": {},
    "Ministral": {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    "Mixtral": {"num_local_experts": 4, "sliding_window": None},
    "Olmo2": {},
    "Olmo3": {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    "Phi3": {},
    "Qwen2Moe": {**EXPERTS, "shared_expert_intermediate_size": 16},
    "Qwen3Moe": EXPERTS,
    "SeedOss": {},
    "SmolLM3": {"no_rope_layers": [1, 0]},
    "StableLm": {},
    "Starcoder2": {"sliding_window": None},
}
"""Further families, and what their configs change.

GPT-NeoX is not among them: Transformers renames the tensors of its old checkpoints by the model type, which converted
models do not need, and has tests of that.
"""
TEXT = {"Gemma3": "Gemma3Text"}
"""What the names of configs and base models begin with, where it is not the family's prefix."""
FURTHER_FORMS = ("rebuilt",)
"""The forms in which these are run."""
SOURCE = "source"
"""Stands for the family's own attention, and so for the class of Transformers, where a form is expected."""

SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.02,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""The sizes of source and converted configs."""

DECOUPLED: dict[str, Any] = {
    "attention_form": "decoupled",
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_up_heads": 2,
}
FULL: dict[str, Any] = {"attention_form": "full", "v_head_dim": 8, "num_up_heads": 4}
FORMS: dict[str, dict[str, Any]] = {
    "full": {**FULL, "k_lora_rank": 12, "v_lora_rank": 8},
    "joint": {**FULL, "kv_lora_rank": 20},
    "shared": DECOUPLED,
    "per-head": {**DECOUPLED, "num_rope_heads": 2},
    "own-up": {**DECOUPLED, "num_up_heads": 4},
    "normed": {**DECOUPLED, "latent_norm": True, "q_lora_rank": 16},
    "rebuilt": {**DECOUPLED, "rope_cache": "rebuilt", "latent_bias": True},
    "hybrid": {**DECOUPLED, "per_layer_config": {"1": {"attention_form": "source"}}},
}
"""Attention forms by name: the config fields that each adds to the source's."""

RUNS = [(family, form) for family in FAMILIES for form in FORMS]
RUNS += [(family, form) for family in FURTHER_FAMILIES for form in FURTHER_FORMS]
"""The families and forms that all tests run on."""

DESCRIPTIONS = {
    "full": "rotation on every key dim; keys and values each have a latent",
    "joint": "rotation on every key dim; one latent for keys and values",
    "shared": "one rotary key for all heads, cached",
    "per-head": "a rotary key per key head, cached",
    "own-up": "one rotary key, cached; an up-projection per query head",
    "normed": "one rotary key, cached; norms on the latents and a latent for queries",
    "rebuilt": "rotary key rebuilt from the latent; biases on the up-projection",
    "hybrid": "one latent layer and one layer with the source's attention",
}


def config_class(family: str, form: str) -> type[PreTrainedConfig]:
    """Return the config class of a source family or of its converted models."""
    name, home = f"{family}MLAConfig", models
    if form == SOURCE:
        name, home = f"{TEXT.get(family, family)}Config", transformers
    found: type[PreTrainedConfig] = getattr(home, name)
    return found


def model_class(family: str, form: str, kind: Kind) -> type[PreTrainedModel]:
    """Return the base model or language model class of a source family or of its converted models."""
    name, home = f"{family}MLA{kind}", models
    if form == SOURCE:
        name, home = f"{TEXT.get(family, family) if kind == 'Model' else family}{kind}", transformers
    found: type[PreTrainedModel] = getattr(home, name)
    return found


def config_fields(form: str, **changes: Any) -> dict[str, Any]:
    """Return the keyword arguments of a config: the common sizes, and a form's fields unless it is the source."""
    return {**SIZES, **({} if form == SOURCE else FORMS[form]), **changes}


def tiny_config(family: str, form: str, **changes: Any) -> PreTrainedConfig:
    """Return a fresh config of a few thousand parameters a layer."""
    own = {**FURTHER_FAMILIES.get(family, {}), **changes}
    if family in FURTHER_FAMILIES:
        # Of smaller weights, rotations with and without scaling sometimes differ by less than a test wants.
        own.setdefault("initializer_range", 0.1)
    return config_class(family, form)(**config_fields(form, **own))
