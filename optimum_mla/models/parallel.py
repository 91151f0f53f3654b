"""How Transformers' tensor parallelism splits latent attention: by heads, with the latent on every device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from optimum_mla.core.geometry import MLAGeometry
from optimum_mla.nn import ATTENTION_FORMS
from optimum_mla.nn.projections import DECOUPLED

ROTARY_KEY = "mla_kv_a_proj"
"""Transformers' style for a projection whose last outputs, the rotary key, all heads read."""


class TensorParallelPlan:
    """The plan of a converted model's config, as an attribute of the config's class.

    Attention that cannot be split is replicated. The plan has no `__set__`, because releases of Transformers assign
    plans with more entries to configs.

    Args:
        source: The plan of the source family's base model, or None if it has none; then there is none of ours.
        attention: Attribute name of the attention in a decoder layer.
        layers: Returns the shapes of the attention layers of a config.
    """

    def __init__(
        self, source: dict[str, str] | None, attention: str, layers: Callable[[Any], Sequence[MLAGeometry]]
    ) -> None:
        self.source, self.prefix, self.layers = source, f"layers.*.{attention}.", layers

    def __get__(self, config: Any, owner: type) -> Any:
        if config is None or self.source is None:
            return None
        elsewhere = {name: style for name, style in self.source.items() if not name.startswith(self.prefix)}
        of_source = {name: style for name, style in self.source.items() if name.startswith(self.prefix)}
        layers = self.layers(config)
        converted = [layer for layer in layers if layer.attention_form != "source"]
        rotary = {layer.qk_rope_head_dim for layer in converted if layer.attention_form == "decoupled"}
        if not of_source or len(rotary) > 1 or not all(map(splits_by_heads, converted)):
            return elsewhere
        styles: dict[str, str] = {}
        for form in {layer.attention_form for layer in converted}:
            styles |= dict.fromkeys(ATTENTION_FORMS[form].roles.by_heads, "colwise")
        if all(layer.q_lora_rank is None for layer in converted):
            styles.pop("q_b_proj", None)
        elif len(converted) == len(layers):
            styles.pop("q_proj")
        if rotary:
            styles[DECOUPLED.latents[0].down] = ROTARY_KEY
        styles[DECOUPLED.output] = "rowwise"
        norms = {name: style for name, style in of_source.items() if name.endswith("_norm")}
        kept = of_source if len(converted) < len(layers) else norms
        return {**elsewhere, **kept, **{f"{self.prefix}{name}": style for name, style in styles.items()}}


def splits_by_heads(geometry: MLAGeometry) -> bool:
    """Return whether the heads of a converted layer can be on several devices.

    They cannot where a norm is over all heads, where heads read different rotary keys or the norms of different keys,
    and where the rotary key is rebuilt: its gradient is the sum over all heads, which no style of Transformers forms.
    """
    if geometry.joint_norms:
        return False
    if geometry.attention_form == "full":
        return True
    return geometry.num_rope_heads == 1 and geometry.rope_cache == "cached" and not geometry.key_norm
