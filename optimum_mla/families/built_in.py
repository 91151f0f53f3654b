"""The families that this package knows, each with what is particular about it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from optimum_mla.families.spec import AttentionSpec

BIASES: dict[str, Any] = dict.fromkeys(("query_bias", "key_value_bias", "output_bias"), "attention_bias")
"""The fields of families whose config has one field for the biases of all projections."""
NO_OUTPUT_BIAS: dict[str, Any] = {**BIASES, "output_bias": False}
HEAD_NORMS: dict[str, Any] = {"query_norm": "q_norm", "key_norm": "k_norm"}

MISTRAL = AttentionSpec("mistral", "Mistral", llama_block=True)
QWEN2 = AttentionSpec("qwen2", "Qwen2", query_bias=True, key_value_bias=True, llama_block=True)
QWEN3 = AttentionSpec("qwen3", "Qwen3", **BIASES, **HEAD_NORMS, llama_block=True)
GEMMA = AttentionSpec("gemma", "Gemma", **BIASES, norm_offset=1.0)
GEMMA2 = replace(
    GEMMA,
    model_type="gemma2",
    class_prefix="Gemma2",
    logit_cap="attn_logit_softcapping",
    head_cap="final_logit_softcapping",
    after_attention="pre_feedforward_layernorm",
)
GRANITE = AttentionSpec(
    "granite", "Granite", **BIASES, embedding_factor="embedding_multiplier", head_divisor="logits_scaling"
)
OLMO2 = AttentionSpec(
    "olmo2", "Olmo2", **BIASES, **HEAD_NORMS, joint_norms=True, input_norm=None, after_attention="mlp"
)

BUILT_IN: dict[str, AttentionSpec] = {
    "Arcee: Llama with another feed-forward part": AttentionSpec("arcee", "Arcee", **BIASES),
    "Cohere (Command R): neighbouring dims turn together, the feed-forward part runs beside the attention": (
        AttentionSpec(
            "cohere",
            "Cohere",
            **BIASES,
            interleaved=True,
            interleaved_table=True,
            head_factor="logit_scale",
            after_attention=None,
        )
    ),
    "Gemma: norms multiply by one plus their weight": GEMMA,
    "Gemma 2: soft-capped logits, sliding windows in every second layer, further norms after the parts": GEMMA2,
    "The language model of Gemma 3: query and key norms, other frequencies in the layers with sliding windows": replace(
        GEMMA2,
        model_type="gemma3_text",
        class_prefix="Gemma3",
        text_prefix="Gemma3Text",
        module="gemma3",
        **HEAD_NORMS,
        logit_cap=None,
    ),
    "GLM-4: neighbouring dims turn together, in half of a head": (
        AttentionSpec("glm4", "Glm4", **NO_OUTPUT_BIAS, interleaved=True)
    ),
    "GPT-NeoX (also Pythia): multi-head attention with one fused projection, rotation of some dims": AttentionSpec(
        "gpt_neox",
        "GPTNeoX",
        **BIASES,
        base="gpt_neox",
        attention="attention",
        embedding="embed_in",
        norm="final_layer_norm",
        output="dense",
        fused="query_key_value",
        fused_by_head=True,
    ),
    "Granite: multipliers on embeddings, scores, residual branches and logits": GRANITE,
    "Granite with experts": replace(GRANITE, model_type="granitemoe", class_prefix="GraniteMoe"),
    "Helium: neighbouring dims turn together": (
        AttentionSpec("helium", "Helium", **NO_OUTPUT_BIAS, interleaved=True, llama_block=True)
    ),
    "Llama (also SmolLM, TinyLlama and every other checkpoint of `model_type: llama`)": (
        AttentionSpec("llama", "Llama", **BIASES, llama_block=True)
    ),
    "Ministral: sliding windows in some layers": replace(MISTRAL, model_type="ministral", class_prefix="Ministral"),
    "Mistral: no biases, a sliding window on every layer where the config names one": MISTRAL,
    "Mixtral: Mistral with experts": AttentionSpec("mixtral", "Mixtral"),
    "OLMo 2: query and key norms over all heads together, norms after the parts instead of before them": OLMO2,
    "OLMo 3: OLMo 2 with sliding windows in some layers": replace(OLMO2, model_type="olmo3", class_prefix="Olmo3"),
    "Phi-3 and Phi-4: one fused projection, rotation of some dims": AttentionSpec("phi3", "Phi3", fused="qkv_proj"),
    "Qwen2 and Qwen2.5: biases on queries, keys and values": QWEN2,
    "Qwen2 with experts": AttentionSpec("qwen2_moe", "Qwen2Moe", query_bias="qkv_bias", key_value_bias="qkv_bias"),
    "Qwen3: an RMSNorm on every query and key head, before the rotation": QWEN3,
    "Qwen3 with experts": replace(QWEN3, model_type="qwen3_moe", class_prefix="Qwen3Moe", llama_block=False),
    "Seed-OSS: biases on queries, keys and values": (
        AttentionSpec("seed_oss", "SeedOss", **{**BIASES, "output_bias": "attention_out_bias"}, llama_block=True)
    ),
    "SmolLM3: every fourth layer has no positions": (
        AttentionSpec("smollm3", "SmolLM3", **BIASES, rotating_layers="no_rope_layers", llama_block=True)
    ),
    "StableLM: rotation of some dims": (
        AttentionSpec("stablelm", "StableLm", query_bias="use_qkv_bias", key_value_bias="use_qkv_bias")
    ),
    "StarCoder2: biases and LayerNorms": AttentionSpec(
        "starcoder2", "Starcoder2", query_bias="use_bias", key_value_bias="use_bias", output_bias="use_bias"
    ),
}
"""The families by what is particular about them."""
