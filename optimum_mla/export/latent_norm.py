"""DeepSeek's norm on the latents of a model that was converted without it, fitted layer by layer to a text.

Engines for DeepSeek norm the latent and have no biases after it. An export can make up for the norm by a constant
channel, but not for engines that load no biases. Here the norm is real. The projections after it are fitted, by ridge
regression, to the keys and values of the model without the norm, and the output projections are refitted as in a
conversion. One layer after the other is fitted on the states that the earlier ones leave.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_mla.calibrate.healing import refit_output
from optimum_mla.calibrate.perplexity import stream_perplexities
from optimum_mla.calibrate.walk import CalibrationWalk
from optimum_mla.calibrate.windows import check_tokens, deciding
from optimum_mla.core.errors import UnsupportedModelError
from optimum_mla.core.geometry import MLAGeometry
from optimum_mla.core.progress import progress
from optimum_mla.models.assemble import assemble_model, converted_config, load_attention
from optimum_mla.models.checks import config_of
from optimum_mla.models.layer_source import LayerSource, for_walking
from optimum_mla.models.layers import model_geometry
from optimum_mla.nn import LatentAttention
from optimum_mla.ops.ridge import Healing, Regression, heal


class Normed(NamedTuple):
    """A model with norms on its latents, and the perplexities on held-back windows without the norms and with them."""

    model: PreTrainedModel
    perplexities: tuple[float, float]


@torch.no_grad()
def with_latent_norms(model: PreTrainedModel, windows: Tensor) -> Normed:
    """Return a copy of a converted model with a norm on the latent of every layer and no biases after it.

    Args:
        model: The converted model, whose layers have a cached rotary key; it is not changed.
        windows: Token ids of the text to fit to, [N, L].

    Raises:
        UnsupportedModelError: A layer has no latent that can be normed so.
        InvalidValueError: The windows are no token ids of the model.
    """
    config = config_of(model)
    check_tokens(windows, config.vocab_size)
    source = LayerSource(model)
    layers = model_geometry(source.family.spec, config).layers
    check_layers(layers)
    walk = CalibrationWalk(source, windows)
    attentions: dict[int, LatentAttention] = {}
    for layer in progress(range(len(layers)), "latent norms: layers", main=True):
        geometry = replace(layers[layer], latent_norm=True, latent_bias=False)
        old = model.get_submodule(source.family.spec.attention_path(layer))
        fitted = _normed(walk, source, layer, geometry)
        walk.advance(fitted)
        like = next(old.parameters())
        tensors = {name: t.to(like) if t.is_floating_point() else t for name, t in fitted.state_dict().items()}
        made = load_attention(source.family, config, layer, tensors, source.rotary, geometry)
        attentions[layer] = made.train(model.training)
    method = next(layer.mla_method for layer in config.per_layer_config if layer.mla_method)
    changed = converted_config(source.family, config, {layer: a.geometry for layer, a in attentions.items()}, method)
    for attention in attentions.values():
        attention.config = changed
    result = assemble_model(copy.deepcopy(model), source.family, changed, attentions)
    return Normed(result, stream_perplexities(walk, deciding(len(windows))))


def check_layers(layers: Sequence[MLAGeometry]) -> None:
    """Refuse layers whose latent cannot get a norm.

    Raises:
        UnsupportedModelError: With the reason.
    """
    for index, g in enumerate(layers):
        for wrong, why in (
            (g.attention_form != "decoupled" or g.rope_cache != "cached", "has no cached rotary key"),
            (g.latent_norm, "has a norm on its latent already"),
            (g.key_value_bias, "belongs to a family with biases on keys and values, for which there is no place"),
            (g.q_lora_rank is not None, "has a latent for queries"),
        ):
            if wrong:
                raise UnsupportedModelError(
                    f"latent_norm: layer {index} {why}. Convert with --rope-cache cached --shared-rope, or with "
                    "--latent-norm."
                )


def _normed(walk: CalibrationWalk, source: LayerSource, layer: int, geometry: MLAGeometry) -> LatentAttention:
    """Return the attention of the layer before which a walk stands, with a norm on its latent, in the walk's dtype."""
    old: Any = walk.attention
    tensors = {name: t.to(walk.dtype) if t.is_floating_point() else t for name, t in old.state_dict().items()}
    tensors.pop("kv_b_proj.bias", None)
    sizes = [_latents(walk, old, walk.source[windows]).square().mean(-1).sqrt() for windows in walk.fitted_batches()]
    # The median is the size of ordinary tokens: the latents of the first ones are many times larger.
    size = float(torch.cat(sizes).median())
    tensors["kv_a_layernorm.weight"] = old.o_proj.weight.new_full((geometry.kv_lora_rank,), size)
    made = load_attention(source.family, source.config, layer, tensors, source.rotary, geometry)
    attention: Any = for_walking(made, source.implementation)
    for part, refit in (("kv_b_proj", _refitted_up), ("o_proj", refit_output)):
        found = refit(walk, attention)
        if found.weight is not None:
            attention.get_submodule(part).weight = nn.Parameter(found.weight.to(walk.dtype))
    return attention  # type: ignore[no-any-return]


def _latents(walk: CalibrationWalk, attention: Any, states: Tensor) -> Tensor:
    """Return the latents of states before the layer, before any norm, [B, L, r]."""
    return attention.kv_a_proj_with_mqa(walk.input_norm(states))[..., : attention.geometry.kv_lora_rank]  # type: ignore[no-any-return]


def _refitted_up(walk: CalibrationWalk, attention: Any) -> Healing:
    """Return a refit of the projection after the norm to the keys and values of the model without the norm.

    Errors are relative to the size of a token's latent, because otherwise the first tokens would decide alone.
    """
    old: Any = walk.attention

    def sums(windows: Tensor) -> tuple[Tensor | float, ...]:
        latents = _latents(walk, old, walk.source[windows])
        normed = attention.kv_a_layernorm(_latents(walk, attention, walk.converted[windows]))
        root = latents.double().square().mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny).rsqrt()
        context = (normed.double() * root).flatten(0, 1)
        wanted = (old.kv_b_proj(latents).double() * root).flatten(0, 1)
        return context.T @ context, context.T @ wanted, float(wanted.square().sum()), len(context)

    batches = walk.fitted_batches(), walk.deciding_batches()
    fit, check = (Regression(*walk.processes.summed(windows, sums)) for windows in batches)
    return heal(attention.kv_b_proj.weight.double(), fit, check)
