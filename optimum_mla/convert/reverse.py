"""The way back from a conversion to the attention of the source family, where there is one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from transformers import PreTrainedModel

from optimum_mla.convert.run import attention_nodes
from optimum_mla.core.errors import InvalidValueError, UnsupportedModelError
from optimum_mla.families.project import source_attention
from optimum_mla.families.restore import HeadWeights, restored
from optimum_mla.methods.base import MLATransformation
from optimum_mla.models.assemble import assemble_model, restored_config
from optimum_mla.models.checks import config_of
from optimum_mla.models.family_table import family_of, is_converted
from optimum_mla.nn import LatentAttention
from optimum_mla.nn.plain import is_plain

TOLERANCE = 1e-5
"""Largest relative size of what the source family has no place for, and what is taken for rounding."""


@torch.no_grad()
def reverse_model(method: MLATransformation, model: PreTrainedModel | GraphModule) -> PreTrainedModel | GraphModule:
    """Give the layers that a method converted the attention of the source family again, in place; return the model.

    Keys and values become products of the two projections around their latents. So where the conversion was exact this
    is the source, and below full rank it is the source with weights of that rank.

    Args:
        method: The transformation. Only its choice of layers matters for a model, but a traced one must have been
            converted with the same options.
        model: The converted model. It is unchanged unless all layers of the method can be reversed.

    Raises:
        UnsupportedModelError: The model is not converted, or a layer computes what no layer of the family does.
        InvalidValueError: The method converted no layer of the model.
    """
    config = config_of(model)
    if not is_converted(config):
        raise UnsupportedModelError("model: it is not converted, so there is nothing to reverse.")
    family, spec = family_of(config), family_of(config).spec
    methods = {
        index: layer.mla_method
        for index, layer in enumerate(config.per_layer_config)
        if layer.attention_form != "source"
    }
    chosen = method.covered_layers(config)
    layers = [index for index, name in methods.items() if name == method.name and index in chosen]
    if not layers:
        raise InvalidValueError("model", ", ".join(sorted(set(methods.values()))), f"layers converted by {method.name}")
    rotary = model.get_submodule(spec.rotary_path)
    with torch.device("meta"):
        source: Any = family.source_model(restored_config(family, config, methods))
    attentions: dict[int, nn.Module] = {}
    for layer in layers:
        latent: Any = model.get_submodule(spec.attention_path(layer))
        block = source.get_submodule(spec.layer_path(layer))
        like = latent.o_proj.weight
        weights = restored(
            source_attention(spec, block, source.config, layer, rotary), _head_weights(latent, layer)
        ) | {f"{spec.output}.{name}": tensor for name, tensor in latent.o_proj.named_parameters()}
        attention = block.get_submodule(spec.attention)
        cast = {name: nn.Parameter(tensor.to(like)) for name, tensor in weights.items()}
        attention.load_state_dict(cast, assign=True)
        attentions[layer] = attention.train(model.training)
    config = restored_config(family, config, layers)
    for attention in attentions.values():
        attention.config = config
    if isinstance(model, PreTrainedModel):
        return assemble_model(model, family, config, attentions)
    for layer, node in attention_nodes(model, family, attentions):
        model.set_submodule(str(node.target), attentions[layer])
        method.mark_as_restored(node)
    model.meta["config"] = config
    return model


def _head_weights(attention: LatentAttention, layer: int) -> HeadWeights:
    """Return the weights of the heads of a converted attention.

    Raises:
        UnsupportedModelError: Its queries, keys and values are not linear maps of the state, with all dims rotated.
    """
    g: Any = attention.geometry
    if g.attention_form != "full":
        raise UnsupportedModelError(
            f"model: layer {layer} has keys of which only some dims rotate, so it cannot be reversed. Conversions with "
            "positional='full' can."
        )
    for name, module in attention.named_children():
        if name.endswith("_proj") and not is_plain(module):
            raise UnsupportedModelError(
                f"model: the {name} of layer {layer} is a {type(module).__name__}. Merge adapters and undo "
                "quantization first."
            )
    shape = (g.num_key_value_heads, -1, g.head_dim)
    found: dict[str, Any] = {}
    for part, side in (("key", "k"), ("value", "v")):
        down: Any = attention.get_submodule("kv_a_proj" if g.kv_lora_rank else f"{side}_a_proj")
        up: Any = attention.get_submodule(f"{side}_b_proj")
        weight = up.weight.double() @ down.weight.double()
        bias = torch.zeros_like(weight[:, 0]) if up.bias is None else up.bias.double()
        if down.bias is not None:
            bias = bias + up.weight.double() @ down.bias.double()
        size = weight.norm(dim=1).mean()
        heads, biases = weight.unflatten(0, shape), bias.unflatten(0, shape)
        if (heads - heads[:, :1]).abs().max() > TOLERANCE * size or (
            biases - biases[:, :1]
        ).abs().max() > TOLERANCE * size:
            raise UnsupportedModelError(
                f"model: in layer {layer} query heads of one group have {part}s of their own, so it cannot be reversed."
            )
        if not g.key_value_bias and bias.abs().max() > TOLERANCE * size:
            raise UnsupportedModelError(
                f"model: the {part}s of layer {layer} have biases, for which its family has no place, so it cannot be "
                "reversed. Calibrated conversions below full rank have them."
            )
        found |= {part: heads[:, 0], f"{part}_bias": biases[:, 0] if g.key_value_bias else None}
    query: Any = attention.q_proj
    split = (g.num_attention_heads, g.head_dim)
    found["query"] = query.weight.double().unflatten(0, split)
    found["query_bias"] = None if query.bias is None else query.bias.double().unflatten(0, split)
    if g.key_norm:
        found |= {f"{part}_gain": attention.get_submodule(f"{part[0]}_norm").weight for part in ("query", "key")}
    return HeadWeights(**found)
