"""Why models of some types cannot be converted, in words for their owners."""

from __future__ import annotations

from typing import Any

ALREADY_LATENT = (
    "axk1",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "kimi_k2",
    "longcat_flash",
    "minicpm3",
    "mistral4",
    "sarvam_mla",
)
"""Types of models whose attention is multi-head latent attention."""

OTHER_REASONS = {
    "gpt_oss": "its attention has sinks, a learned logit for each head that belongs to no token, which the latent "
    "attention of this package does not have",
    "ministral3": "its queries are multiplied by a factor that grows with the position",
}
"""Reasons by the type of model."""


def refusal(config: Any) -> str | None:
    """Return why a model cannot be converted, with what to do instead, or None if nothing is known against it."""
    model_type = getattr(config, "model_type", None)
    if model_type in ALREADY_LATENT or getattr(config, "kv_lora_rank", None):
        return "its attention is latent already, so there is nothing to convert"
    if model_type in OTHER_REASONS:
        return OTHER_REASONS[model_type]
    text = getattr(config, "text_config", None)
    if text is not None:
        return (
            f"it is a wrapper around a language model of the type {text.model_type!r}. Extract that model with "
            "optimum_mla.models.language_model, as docs/families.md shows, and give it here"
        )
    return None
