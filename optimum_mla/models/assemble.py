"""Assembly of a converted model from its converted attention layers and the other weights of the source model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from optimum_mla.core.geometry import MLAGeometry
from optimum_mla.models.classes import is_tied
from optimum_mla.models.config import MLA_CONFIG_FIELDS
from optimum_mla.models.family_table import Family, is_converted
from optimum_mla.models.layers import build_attention
from optimum_mla.nn import LatentAttention

NOT_CARRIED = ("model_type", "architectures", "auto_map", "transformers_version", "per_layer_config", "latent_codec")
"""Keys of a source config that the converted config does not take over."""


def converted_config(
    family: Family, source: PreTrainedConfig, plans: dict[int, MLAGeometry], method: str
) -> PreTrainedConfig:
    """Return the config of a model whose layers a method converts to the given shapes, by their index.

    The shape that most converted layers have goes into the config's own fields, and what differs from it goes into
    `per_layer_config`. Layers that were converted earlier keep their fields.
    """
    layers: list[dict[str, Any]] = []
    for index, layer_config in enumerate(source.per_layer_config):
        if index in plans:
            shape = plans[index]
            fields = {name: getattr(shape, name) for name in MLA_CONFIG_FIELDS if name != "mla_method"}
            layers.append({**fields, "mla_method": method})
        elif is_converted(source) and layer_config.attention_form != "source":
            layers.append({name: getattr(layer_config, name) for name in MLA_CONFIG_FIELDS})
        else:
            layers.append({"attention_form": "source"})

    converted = [tuple(layer.items()) for layer in layers if layer["attention_form"] != "source"]
    common = dict(Counter(converted).most_common(1)[0][0])
    differences = {
        index: {name: value for name, value in layer.items() if value != common[name]}
        for index, layer in enumerate(layers)
    }
    carried = {
        name: value
        for name, value in source.to_dict().items()
        if name not in NOT_CARRIED and name not in MLA_CONFIG_FIELDS
    }
    per_layer = {index: fields for index, fields in differences.items() if fields}
    return family.config(
        **carried,
        **common,
        architectures=[family.model.__name__],
        name_or_path=source.name_or_path,
        attn_implementation=source._attn_implementation,
        per_layer_config=per_layer or None,
    )


def load_attention(
    family: Family,
    config: PreTrainedConfig,
    layer: int,
    tensors: dict[str, Tensor],
    rotary: nn.Module,
    geometry: MLAGeometry,
) -> LatentAttention:
    """Return the latent attention of one layer with its parameters and buffers, given by their names.

    The attention shares the model's rotary embedding.
    """
    with torch.device("meta"):
        attention = build_attention(family.spec, config, layer, rotary, geometry)
    attention.load_state_dict(tensors, assign=True)
    return attention


def assemble_model(
    model: PreTrainedModel, family: Family, config: PreTrainedConfig, attentions: Mapping[int, nn.Module]
) -> PreTrainedModel:
    """Turn `model` into the converted model, or a converted one into the source's kind, in place, and return it.

    The object stays the same, and its class becomes that of the config. The converted model is built on the meta
    device and takes over the parameters of the source model, so only the new attentions take further memory.

    Args:
        model: A source model, or a model of which other layers are converted.
        family: The model's family.
        config: The config that `converted_config` returned.
        attentions: The new attention modules, by the index of the layer.
    """
    with torch.device("meta"):
        made: Any = family.model if is_converted(config) else family.source_model
        converted = made(config)
    prefixes = {layer: f"{family.spec.attention_path(layer)}." for layer in attentions}
    state = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if not name.startswith(tuple(prefixes.values()))
    }
    for layer, attention in attentions.items():
        state |= attention.state_dict(prefix=prefixes[layer], keep_vars=True)
    trained = {name for name, tensor in state.items() if tensor.requires_grad}
    converted.load_state_dict(state, assign=True)
    for name, parameter in converted.named_parameters():
        parameter.requires_grad_(name in trained)
    # The module itself is kept, because a rotary embedding that depends on the length also remembers the longest pass.
    rotary = model.get_submodule(family.spec.rotary_path)
    setattr(converted.get_submodule(family.spec.base), family.spec.rotary, rotary)
    for module in converted.modules():
        if isinstance(module, LatentAttention):
            object.__setattr__(module, "rotary", rotary)
    # Other buffers that checkpoints do not hold are taken from the source model as well.
    buffers = dict(model.named_buffers())
    for name, buffer in converted.named_buffers():
        if buffer.is_meta:
            owner, _, attribute = name.rpartition(".")
            setattr(converted.get_submodule(owner), attribute, buffers[name])
    # Whether the head is tied is read from the weights, because a checkpoint may hold a head that its config denies.
    config.tie_word_embeddings = is_tied(model)
    if config.tie_word_embeddings:
        converted.tie_weights()
    converted.train(model.training)
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        converted.gradient_checkpointing_enable()
    converted.generation_config = model.generation_config

    model.__class__ = type(converted)
    model.__dict__.clear()
    model.__dict__.update(converted.__dict__)
    return model
