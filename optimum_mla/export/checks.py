"""Which converted models `deepseek_v3` can express."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import psutil

from optimum_mla.core.errors import InvalidValueError, UnsupportedModelError
from optimum_mla.core.geometry import MLAGeometry
from optimum_mla.families.spec import sliding_window
from optimum_mla.models.family_table import family_of, is_converted
from optimum_mla.models.layers import model_geometry
from optimum_mla.stack import FIXED_ROPE_TYPES, rope_type

DOUBLE_BYTES = 8
"""Bytes of a number of the one layer that is in float64 while it is made."""


def refuse(reason: str, remedy: str) -> UnsupportedModelError:
    """Return the error for a model that `deepseek_v3` cannot express."""
    return UnsupportedModelError(f"export: {reason}. {remedy}")


def different_frequencies() -> UnsupportedModelError:
    """Return the error for a model whose layers do not all rotate alike."""
    remedy = "Convert with --shared-rope, which gives all layers the same."
    return refuse("the layers rotate at different frequencies, DeepSeek's all at the same", remedy)


def check_exportable(config: Any, pad: bool = False) -> None:
    """Check by its config alone whether `deepseek_v3` can express a model.

    Args:
        config: The config of a converted model.
        pad: Whether layers may be padded to the largest rank.

    Raises:
        UnsupportedModelError: The model cannot be exported. The message names the options of a conversion that can be
            exported, if there are any.
    """
    if not is_converted(config):
        raise refuse("the model is not converted", "Run optimum-cli mla-convert on it first.")
    if getattr(config, "quantization_config", None) is not None:
        raise refuse("the model's weights are quantized", "Export the unquantized model.")
    spec = family_of(config).spec
    if not spec.llama_block:
        raise refuse(f"the layers of {spec.model_type} are not those of Llama", "Such models run in this package.")
    layers = model_geometry(spec, config).layers
    engine_form = "Convert with --method gqa2mla --rope-cache cached --shared-rope."
    for index, g in enumerate(layers):
        if g.attention_form == "source":
            raise refuse(f"layer {index} keeps the source's attention", "Convert all layers.")
        if g.attention_form == "full":
            raise refuse("the rotation acts on up-projected keys (positional full)", engine_form)
        if g.key_norm:
            raise refuse("the model norms its queries and keys, DeepSeek does not", "Such models run in this package.")
        if not spec.rotates(config, index):
            raise refuse(f"layer {index} has no positions, DeepSeek's all do", "Such models run in this package.")
        if g.num_rope_heads > 1:
            raise refuse(f"every layer has {g.num_rope_heads} rotary keys, DeepSeek one", engine_form)
        if g.rope_cache == "rebuilt":
            raise refuse("the rotary key is rebuilt from the latent", engine_form)
        if sliding_window(config, index) is not None:
            raise refuse(f"layer {index} has a sliding window", "Such models run in this package.")
        if g.latent_norm and g.up_bias:
            raise refuse("a latent that is normed leaves no place for biases", "Convert without the latent norm.")
        if g.latent_norm and g.query_bias:
            raise refuse("a query latent that is normed leaves no place for biases", "Convert without the latent norm.")
    for field, values in (
        ("rotary dims", {g.qk_rope_head_dim for g in layers}),
        ("query ranks", {g.q_lora_rank for g in layers}),
        ("latent norms", {g.latent_norm for g in layers}),
    ):
        if len(values) > 1:
            raise refuse(f"layers differ in their {field} ({', '.join(sorted(map(str, values)))})", engine_form)
    ranks = sorted({g.kv_lora_rank for g in layers})
    if len(ranks) > 1 and not pad:
        remedy = "Pad them to the largest with --pad, or convert with --rank-allocation uniform."
        raise refuse(f"the layers' latents have ranks from {ranks[0]} to {ranks[-1]}", remedy)
    rope = rope_type(config)
    if rope not in FIXED_ROPE_TYPES:
        raise refuse(f"{rope} rotary scaling depends on the length at hand", "Such models run in this package.")
    if getattr(config, "mlp_bias", False):
        raise refuse("the feed-forward layers have biases, DeepSeek's do not", "Such models run in this package.")


def check_padding(pad_to: tuple[int, int], layers: Sequence[MLAGeometry], normed: bool) -> None:
    """Check the sizes to which an export shall be padded, before anything of these sizes is made.

    Args:
        pad_to: Rank of the latent, and dims of the rotary key.
        layers: The shapes of a model that has passed `check_exportable`.
        normed: Whether the model norms its latents; otherwise they get a constant channel.

    Raises:
        InvalidValueError: The model is larger than that, or the padded attention is larger than the free memory.
    """
    rank, rope = pad_to
    g, received = layers[0], f"{rank}+{rope}"
    least = max(layer.kv_lora_rank for layer in layers) + (0 if normed else 1)
    if rank < least or rope < g.qk_rope_head_dim or rope % 2:
        allowed = f"a latent from {least} and an even number of rotary dims from {g.qk_rope_head_dim}"
        raise InvalidValueError("pad_to", received, f"{allowed} for this model")
    heads, queries = g.num_attention_heads, g.q_lora_rank or g.hidden_size
    numbers = rank * (g.hidden_size + heads * (g.qk_nope_head_dim + g.v_head_dim))
    numbers += rope * (g.hidden_size + heads * queries)
    needed, free = numbers * (2 * len(layers) + DOUBLE_BYTES), psutil.virtual_memory().available
    if needed > free:
        allowed = f"what fits into memory: the attention would take {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"
        raise InvalidValueError("pad_to", received, allowed, "Take those that the engine asks for, such as 512+64.")
