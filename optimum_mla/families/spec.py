"""Descriptions of model families: the names of the projections, biases, norms and rotary embedding that we read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optimum_mla.core.errors import UnsupportedModelError
from optimum_mla.core.geometry import MLAGeometry


@dataclass(frozen=True)
class AttentionSpec:
    """The description of a model family.

    A bias field is True, False, or the name of the config field that says whether the projection has a bias.

    Attributes:
        model_type: The family's `model_type` in Transformers; its converted models are `<model_type>_mla`.
        class_prefix: What the family's class names in Transformers begin with ("Llama" of `LlamaForCausalLM`).
        query_bias, key_value_bias, output_bias: Which projections have a bias.
        query_norm, key_norm: Attribute names of the RMSNorms on query and key heads, or None.
        base, layers, attention, rotary: Attribute names on the way from the model to its attention.
        embedding, norm: Attribute names, in the base model, of the token embedding and of the norm behind all layers.
        head: Attribute name, in the model, of the language-model head.
        input_norm, mlp_norm, mlp: Attribute names, in a decoder layer, of the norm before the attention, of the norm
            before the feed-forward part, and of that part.
        query, key, value, output: Attribute names of the four projections.
    """

    model_type: str
    class_prefix: str
    query_bias: bool | str = False
    key_value_bias: bool | str = False
    output_bias: bool | str = False
    query_norm: str | None = None
    key_norm: str | None = None
    base: str = "model"
    layers: str = "layers"
    attention: str = "self_attn"
    rotary: str = "rotary_emb"
    embedding: str = "embed_tokens"
    norm: str = "norm"
    head: str = "lm_head"
    input_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    mlp: str = "mlp"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"

    @property
    def mla_model_type(self) -> str:
        """Return the `model_type` of the converted family."""
        return f"{self.model_type}_mla"

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

    def features(self, config: Any) -> dict[str, bool]:
        """Return the fields of `MLAGeometry` about biases and norms, which not every family's config has.

        Args:
            config: The config of a model, or of a layer, of this family.
        """

        def has(field: bool | str) -> bool:
            return bool(getattr(config, field, False)) if isinstance(field, str) else field

        return {
            "query_bias": has(self.query_bias),
            "key_value_bias": has(self.key_value_bias),
            "output_bias": has(self.output_bias),
            "key_norm": self.key_norm is not None,
        }

    def geometry(self, layer_config: Any) -> MLAGeometry:
        """Return the shape of one layer, given its config in a source model or in a converted one."""
        return MLAGeometry.from_config(layer_config, **self.features(layer_config))


def sliding_window(config: Any, layer: int) -> int | None:
    """Return the length of a layer's sliding window in tokens, or None for full attention."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and layer_types[layer] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


class SourceAttention:
    """The weights of a source model's attention in float64, split by heads.

    H is the number of query heads, G the number of key and value heads, D the head dim and d the hidden size. A weight
    is cast when it is first read, and the object keeps the float64 copy. So an object should not live longer than the
    work on its layer.

    Args:
        spec: The description of the family.
        module: The attention module of the source model.
        geometry: The shape of the layer.
        attention_scaling: The factor by which the rotary embedding multiplies cos and sin, as with YaRN; otherwise 1.0.
        input_gain: The gain of the norm before the attention, [d].
    """

    def __init__(
        self,
        spec: AttentionSpec,
        module: nn.Module,
        geometry: MLAGeometry,
        attention_scaling: float,
        input_gain: Tensor,
    ) -> None:
        self.spec, self.module, self.geometry = spec, module, geometry
        self.attention_scaling, self.input_gain = attention_scaling, input_gain
        self._weights: dict[str, Tensor] = {}

    def _linear(self, name: str) -> nn.Linear:
        return self.module.get_submodule(name)  # type: ignore[return-value]

    def _weight(self, name: str) -> Tensor:
        if name not in self._weights:
            self._weights[name] = self._linear(name).weight.detach().double()
        return self._weights[name]

    def _heads(self, name: str) -> Tensor:
        return self._weight(name).unflatten(0, (-1, self.geometry.head_dim))

    def _bias(self, name: str) -> Tensor:
        linear = self._linear(name)
        flat = torch.zeros(linear.out_features) if linear.bias is None else linear.bias.detach()
        return flat.to(linear.weight.device).double().unflatten(0, (-1, self.geometry.head_dim))

    @property
    def query(self) -> Tensor:
        """Return the query weight W_Q, [H, D, d]."""
        return self._heads(self.spec.query)

    @property
    def key(self) -> Tensor:
        """Return the key weight W_K, [G, D, d]."""
        return self._heads(self.spec.key)

    @property
    def gained_key(self) -> Tensor:
        """Return the key weight W_K times the gain of the key norm, [G, D, d].

        With a key norm, a key is this weight times the state, divided by the root mean square of the unnormed key.
        """
        return self.key * self.norm_gain(self.spec.key_norm)[:, None]

    @property
    def gained_key_bias(self) -> Tensor:
        """Return the key bias times the gain of the key norm, [G, D]."""
        return self.key_bias * self.norm_gain(self.spec.key_norm)

    @property
    def value(self) -> Tensor:
        """Return the value weight W_V, [G, D, d]."""
        return self._heads(self.spec.value)

    @property
    def query_bias(self) -> Tensor:
        """Return the query bias, [H, D], which is zero if the projection has none."""
        return self._bias(self.spec.query)

    @property
    def key_bias(self) -> Tensor:
        """Return the key bias, [G, D], which is zero if the projection has none."""
        return self._bias(self.spec.key)

    @property
    def value_bias(self) -> Tensor:
        """Return the value bias, [G, D], which is zero if the projection has none."""
        return self._bias(self.spec.value)

    def norm_gain(self, name: str | None) -> Tensor:
        """Return the gain of a norm on query or key heads, [D].

        Args:
            name: The name of the norm in the attention module; None gives ones.
        """
        if name is None:
            device = self._linear(self.spec.query).weight.device
            return torch.ones(self.geometry.head_dim, dtype=torch.float64, device=device)
        return self.module.get_submodule(name).weight.detach().double()  # type: ignore[union-attr, operator]

    def output(self) -> dict[str, Tensor]:
        """Return the parameters of the output projection as `o_proj.weight` and, if it has one, `o_proj.bias`.

        They keep the dtype of the model.
        """
        return {f"o_proj.{name}": value.detach() for name, value in self._linear(self.spec.output).named_parameters()}


def source_attention(
    spec: AttentionSpec, decoder_layer: nn.Module, config: Any, layer: int, attention_scaling: float
) -> SourceAttention:
    """Return the source attention of one layer of a model.

    Args:
        spec: The model's family.
        decoder_layer: The decoder layer.
        config: The model's config.
        layer: The layer's index.
        attention_scaling: The factor by which the rotary embedding multiplies cos and sin.

    Raises:
        UnsupportedModelError: A projection is not an `nn.Linear`, or the spec names a module that the model lacks.
    """
    module = spec.part(decoder_layer, spec.attention, layer)
    for name in (spec.query, spec.key, spec.value, spec.output):
        kind = type(spec.part(module, name, layer))
        if kind is not nn.Linear:
            raise UnsupportedModelError(
                f"model: {spec.attention_path(layer)}.{name} is no plain linear layer but "
                f"{kind.__module__}.{kind.__qualname__}. Merge adapters and undo quantization first."
            )
    gain = spec.part(decoder_layer, f"{spec.input_norm}.weight", layer).detach()
    return SourceAttention(spec, module, spec.geometry(config.per_layer_config[layer]), attention_scaling, gain)
