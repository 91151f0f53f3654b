"""Fits the codec of a model again after its weights have changed, to the same bytes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_mla.calibrate.layer import LayerCalibration
from optimum_mla.calibrate.walk import CalibrationWalk
from optimum_mla.calibrate.windows import check_tokens
from optimum_mla.codec.vectors import VectorCodec
from optimum_mla.convert.codec import layer_fit
from optimum_mla.core.errors import UnsupportedModelError
from optimum_mla.core.progress import progress
from optimum_mla.models.checks import config_of
from optimum_mla.models.codec import ModelCodec, probe_of
from optimum_mla.models.layer_source import LayerSource


def moved_codec(model: PreTrainedModel, codec: ModelCodec) -> ModelCodec:
    """Return a codec as it is, but for what tells its model from others: it is then taken for this model.

    Args:
        model: The model, with other weights than that to which the codec was fitted.
        codec: The codec.

    Raises:
        UnsupportedModelError: The model is of another type, or its keys and values have other shapes.
    """
    config = config_of(model)
    if config.model_type != codec.model_type or max(codec.layers) >= config.num_hidden_layers:
        raise UnsupportedModelError(
            f"refit: got a codec of a {codec.model_type} of at least {max(codec.layers) + 1} layers, allowed: one of "
            f"this {config.model_type} of {config.num_hidden_layers} layers"
        )
    probes = {layer: probe_of(model, layer) for layer in codec.layers}
    for layer, own in codec.layers.items():
        if len(probes[layer]) != own.width:
            raise UnsupportedModelError(
                f"refit: got a codec of {own.width} numbers a token in layer {layer}, allowed: {len(probes[layer])}"
            )
    return replace(codec, probes=probes)


@torch.no_grad()
def refit_codec(model: PreTrainedModel, codec: ModelCodec, windows: Tensor) -> ModelCodec:
    """Return a codec with the bytes of another one in each layer, fitted to the present weights of a model.

    Args:
        model: A causal language model, such as one that was trained since its codec was fitted.
        codec: The codec, whose bytes and exact tokens stay.
        windows: Token ids of ordinary text, [N, L].

    Raises:
        UnsupportedModelError: The codec is of a model of another type or shape.
        CalibrationDataError: The windows say nothing.
    """
    same, source = moved_codec(model, codec), LayerSource(model, quantized=True)
    check_tokens(windows, source.config.vocab_size)
    walk = CalibrationWalk(source, windows)
    layers: dict[int, VectorCodec] = {}
    for layer in progress(range(max(codec.layers) + 1), "codec: layers", main=True):
        if layer in codec.layers:
            layout = codec.layers[layer].layout
            calibration = LayerCalibration(walk, source.attention(layer))
            fit = layer_fit(calibration, layout.bytes_per_token, layout.gain_groups)
            layers[layer] = fit.codec(layout.bytes_per_token)
        walk.advance()
    return replace(same, layers=layers)
