"""Descriptions of model families: where their models keep what a conversion reads, and what their layers compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from optimum_mla.core.errors import UnsupportedModelError
from optimum_mla.core.geometry import MLAGeometry
from optimum_mla.nn.norm import NORM_EPS


@dataclass(frozen=True)
class AttentionSpec:
    """The description of a model family.

    A bias field is True, False, or the name of the config field that says whether the projection has a bias. A factor
    is a number, the name of the config field that holds it, or None for 1. The factor on the logits is not described:
    it is the attention's own `scaling`.

    Attributes:
        model_type: The family's `model_type` in Transformers; its converted models are `<model_type>_mla`.
        class_prefix: What the family's class names in Transformers begin with ("Llama" of `LlamaForCausalLM`).
        text_prefix: What the names of its config and of its base model begin with, where that is something else
            ("Gemma3Text" of `Gemma3TextModel`).
        module: Name of the module of Transformers that holds these classes; None takes the `model_type`.
        query_bias, key_value_bias, output_bias: Which projections have a bias.
        query_norm, key_norm: Attribute names of the RMSNorms on query and key heads, or None.
        joint_norms: Whether such a norm takes the root mean square over all heads together instead of over each.
        norm_offset: What the family's RMSNorms add to their weight to get their gain.
        interleaved: Whether dims 2i and 2i + 1 of a head turn together, instead of i and i plus half of the rotary
            dims.
        interleaved_table: Whether the tables of cos and sin repeat each angle for neighbouring dims, instead of in
            their second half.
        rotating_layers: Name of the config field that says for each layer whether its attention rotates queries and
            keys, or None where all do.
        logit_cap: Name of the config field with the soft-cap c of the scaled logits x, c·tanh(x / c), or None.
        embedding_factor: The factor on the token embeddings before the first layer.
        head_factor, head_divisor: The factor on the logits of the language-model head, and what they are divided by.
        head_cap: Name of the config field with the soft-cap of those logits, or None.
        llama_block: Whether all but the attention is named and computed as in Llama, so that an export takes it over.
        base, layers, attention, rotary: Attribute names on the way from the model to its attention.
        embedding, norm: Attribute names, in the base model, of the token embedding and of the norm after all layers.
        head: Attribute name, in the model, of the language-model head.
        input_norm: Attribute name, in a decoder layer, of the norm before the attention, or None where there is none.
        after_attention: Attribute name, in a decoder layer, of a module whose input is the hidden state after the
            attention, or None where the feed-forward part runs beside the attention.
        query, key, value, output: Attribute names of the four projections.
        fused: Attribute name of the one projection that gives queries, keys and values, or None.
        fused_by_head: Whether its rows are the query, the key and the value of one head after the other, instead of
            all queries, all keys and all values.
    """

    model_type: str
    class_prefix: str
    text_prefix: str | None = None
    module: str | None = None
    query_bias: bool | str = False
    key_value_bias: bool | str = False
    output_bias: bool | str = False
    query_norm: str | None = None
    key_norm: str | None = None
    joint_norms: bool = False
    norm_offset: float = 0.0
    interleaved: bool = False
    interleaved_table: bool = False
    rotating_layers: str | None = None
    logit_cap: str | None = None
    embedding_factor: float | str | None = None
    head_factor: float | str | None = None
    head_divisor: float | str | None = None
    head_cap: str | None = None
    llama_block: bool = False
    base: str = "model"
    layers: str = "layers"
    attention: str = "self_attn"
    rotary: str = "rotary_emb"
    embedding: str = "embed_tokens"
    norm: str = "norm"
    head: str = "lm_head"
    input_norm: str | None = "input_layernorm"
    after_attention: str | None = "post_attention_layernorm"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    fused: str | None = None
    fused_by_head: bool = False

    @property
    def mla_model_type(self) -> str:
        """Return the `model_type` of the converted family."""
        return f"{self.model_type}_mla"

    @property
    def projections(self) -> tuple[str, ...]:
        """Return the attribute names of the linear layers of an attention."""
        inner = (self.query, self.key, self.value) if self.fused is None else (self.fused,)
        return *inner, self.output

    def layer_path(self, layer: int) -> str:
        """Return the dotted name of a decoder layer in the model."""
        return f"{self.base}.{self.layers}.{layer}"

    def attention_path(self, layer: int) -> str:
        """Return the dotted name of a layer's attention in the model."""
        return f"{self.layer_path(layer)}.{self.attention}"

    @property
    def rotary_path(self) -> str:
        """Return the dotted name of the rotary embedding in the model."""
        return f"{self.base}.{self.rotary}"

    def part(self, owner: nn.Module, name: str, layer: int) -> Any:
        """Return a module or a parameter that this spec names.

        Args:
            owner: The module in which it is looked up, such as the model or a decoder layer.
            name: Its dotted name in that module.
            layer: Index of the decoder layer to which it belongs, for the message.

        Raises:
            UnsupportedModelError: Nothing has that name.
        """
        found: Any = owner
        try:
            for attribute in name.split("."):
                found = getattr(found, attribute)
        except AttributeError as error:
            raise UnsupportedModelError(
                f"model: layer {layer} of this {self.model_type} model has no {name!r}, which its AttentionSpec names. "
                "Give the spec the family's own names (docs/add_a_family.md)."
            ) from error
        return found

    def features(self, config: Any) -> dict[str, Any]:
        """Return the fields of `MLAGeometry` about biases, norms and caps, which not every family's config has."""

        def has(field: bool | str) -> bool:
            return bool(getattr(config, field, False)) if isinstance(field, str) else field

        return {
            "query_bias": has(self.query_bias),
            "key_value_bias": has(self.key_value_bias),
            "output_bias": has(self.output_bias),
            "key_norm": self.key_norm is not None,
            "joint_norms": self.joint_norms,
            "logit_cap": None if self.logit_cap is None else getattr(config, self.logit_cap, None),
        }

    def geometry(self, layer_config: Any) -> MLAGeometry:
        """Return the shape of one layer, given its config in a source model or in a converted one."""
        return MLAGeometry.from_config(layer_config, **self.features(layer_config))

    def rotates(self, config: Any, layer: int) -> bool:
        """Return whether a layer's attention rotates queries and keys."""
        return self.rotating_layers is None or bool(getattr(config, self.rotating_layers)[layer])

    def embedded(self, config: Any, embeddings: Tensor) -> Tensor:
        """Return what enters the first layer, given the output of the token embedding."""
        factor = _factor(config, self.embedding_factor)
        return embeddings if factor == 1 else embeddings * factor

    def logits(self, config: Any, headed: Tensor) -> Tensor:
        """Return the model's logits, given the output of its language-model head."""
        factor = _factor(config, self.head_factor) / _factor(config, self.head_divisor)
        scaled = headed if factor == 1 else headed * factor
        cap = None if self.head_cap is None else getattr(config, self.head_cap, None)
        return scaled if cap is None else cap * (scaled / cap).tanh()


def _factor(config: Any, factor: float | str | None) -> float:
    value = getattr(config, factor, None) if isinstance(factor, str) else factor
    return 1.0 if value is None else float(value)


def layer_type(config: Any, layer: int) -> str | None:
    """Return the type of a layer, such as `sliding_attention`, or None where the config tells no types apart."""
    layer_types = getattr(config, "layer_types", None)
    return None if layer_types is None else layer_types[layer]


def sliding_window(config: Any, layer: int) -> int | None:
    """Return the length of a layer's sliding window in tokens, or None for full attention."""
    if layer_type(config, layer) not in (None, "sliding_attention"):
        return None
    return getattr(config, "sliding_window", None) or None


def full_layers(config: Any) -> list[int]:
    """Return the indices of the layers with full attention, or of all layers where all have a sliding window."""
    layers = list(range(config.num_hidden_layers))
    return [layer for layer in layers if sliding_window(config, layer) is None] or layers


def norm_eps(config: Any) -> float:
    """Return what the RMSNorms of a model add to the mean square."""
    return float(getattr(config, "rms_norm_eps", None) or NORM_EPS)
