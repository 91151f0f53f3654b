"""Fits the codec of a model in one pass over a text: the source's own states, no refits, no candidates."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from optimum_mla.cache.codec_layer import EXACT_TOKENS, ExactTokens
from optimum_mla.calibrate.calibration import Calibration
from optimum_mla.calibrate.gradients import Gradients
from optimum_mla.calibrate.layer import LayerCalibration
from optimum_mla.calibrate.statistics_folder import CalibrationStatistics
from optimum_mla.calibrate.walk import CalibrationWalk
from optimum_mla.calibrate.weighting import key_moments, value_moments
from optimum_mla.calibrate.windows import check_tokens
from optimum_mla.codec.fit import CodeTable
from optimum_mla.codec.fit_vectors import Axes, VectorFit
from optimum_mla.codec.layout import GAIN_BITS, GAIN_GROUPS
from optimum_mla.codec.vectors import VectorCodec
from optimum_mla.convert.record import Record, SharedRecord
from optimum_mla.core.errors import InvalidValueError, UnsupportedModelError
from optimum_mla.core.layers import LayerChoice, parse_layers
from optimum_mla.core.number_checks import check_number
from optimum_mla.core.processes import ALONE, Processes
from optimum_mla.core.progress import progress
from optimum_mla.core.segments import GRANULE
from optimum_mla.families.project import SourceAttention
from optimum_mla.families.spec import sliding_window
from optimum_mla.models.checks import config_of
from optimum_mla.models.codec import ModelCodec, probe_of
from optimum_mla.models.family_table import family_of, is_converted
from optimum_mla.models.layer_source import LayerSource
from optimum_mla.ops.weighted import WeightedFactorization, WeightedRows
from optimum_mla.plan.allocation import allocate, scaled
from optimum_mla.stack import rope_type

LARGEST_BUDGET = 0.5
REACH = (0.5, 0.7, 1.0, 1.4, 2.0)
"""Sizes at which the error of a layer's codes is computed, as multiples of the mean size."""


@torch.no_grad()
def fit_codec(
    model: PreTrainedModel,
    calibration: Tensor | CalibrationStatistics,
    kv_cache_budget: float = 0.125,
    gain_groups: int = GAIN_GROUPS,
    exact: ExactTokens = EXACT_TOKENS,
    layers: LayerChoice = "all",
    processes: Processes = ALONE,
    record: Record | None = None,
) -> ModelCodec:
    """Return a codec for the keys and values of a model, whose weights stay as they are.

    Bytes are shared between layers by how far the predictions move if old tokens come from codes, which gradients tell.
    Stored statistics cannot tell that, so with them bytes are shared by the errors in the hidden states.

    Args:
        model: A causal language model with plain or quantized weights.
        calibration: Token ids of ordinary text, [N, L], in windows longer than the tokens that stay exact. Or
            statistics of the model, with which nothing is run through it.
        kv_cache_budget: Bytes of the codes of a token, divided by those of the source's cache in 16 bits, above 0 and
            up to 0.5, in the layers that are coded.
        gain_groups: Number of groups of channels that have a gain in each token, 0 or a multiple of 8.
        exact: Which tokens are never read from codes.
        layers: The layers to code, as in `MLATransformation`. Layers with a sliding window keep their cache.
        processes: The processes that share the work; each returns the same codec.
        record: Keeps what was found, and knows what an interrupted run of the same arguments found.

    Raises:
        InvalidValueError: A value is out of range, or the budget leaves no room for a channel.
        UnsupportedModelError: The model is converted already, its rotary frequencies depend on the length, or it cannot
            be read; see `LayerSource`.
        CalibrationDataError: The windows say nothing, or the statistics are of another model.
    """
    check_number("kv_cache_budget", kv_cache_budget, f"above 0, up to {LARGEST_BUDGET}")
    if not 0 < kv_cache_budget <= LARGEST_BUDGET:
        raise InvalidValueError("kv_cache_budget", kv_cache_budget, f"above 0, up to {LARGEST_BUDGET}")
    chosen = codable_layers(config_of(model), layers)
    source = LayerSource(model, quantized=True)
    fits = LayerFits(kv_cache_budget, gain_groups, SharedRecord(record or Record(), processes))
    if isinstance(calibration, CalibrationStatistics):
        for layer in progress(chosen, "codec: layers", main=True):
            stored = calibration.layer(layer, source.attention(layer))
            fits.add(layer, stored, stored.state_weight)
    else:
        check_tokens(calibration, source.config.vocab_size)
        least = exact.sinks + exact.recent
        if calibration.shape[1] <= least:
            allowed = f"more than {least}, which stay exact"
            raise InvalidValueError("calibration_length", calibration.shape[1], allowed)
        _fit_on_windows(fits, CalibrationWalk(source, calibration, processes), chosen, exact)
    codecs = fits.codecs(processes)
    probes = {layer: probe_of(model, layer) for layer in chosen}
    return ModelCodec(codecs, probes, source.config.model_type, exact)


def _fit_on_windows(fits: LayerFits, walk: CalibrationWalk, chosen: tuple[int, ...], exact: ExactTokens) -> None:
    """Fit the chosen layers in one pass, and weigh their errors on the way back by what they do to the predictions.

    A run that goes on walks through the layers again, but fits and passes back only what the record does not hold.

    Args:
        fits: Takes the layers.
        walk: A walk that stands before the first layer of the model.
        chosen: The layers to code.
        exact: Which tokens are never read from codes.
    """
    gradients = Gradients(walk, exact)
    for layer in progress(range(walk.model.num_layers), "codec: layers", main=True):
        if layer in chosen:
            fits.add(layer, LayerCalibration(walk, walk.model.attention(layer)), 1.0)
        gradients.advance()
    title, record = "codec: effect on the predictions", fits.record
    reached = next(((one, kept["before"]) for one in chosen if (kept := record.tensors(f"gradient {one}"))), None)
    moved = {layer: record.known(f"moved {layer}") for layer in chosen}
    told = None if reached is None else reached[0]
    for layer, vectors, found in gradients.of_layers(chosen, title, reached):
        moved[layer] = fits.moved(layer, vectors, found)
        record.keep(f"moved {layer}", moved[layer])
        record.keep_tensors(f"gradient {layer}", {"before": gradients.before})
        if told is not None:
            record.drop_tensors(f"gradient {told}")
        told = layer
    for layer, by in moved.items():
        fits.weigh(layer, by)


class LayerFits:
    """The fits of the layers of a model, and what codes of other sizes would cost in each.

    Args:
        budget: Bytes of a token's codes, divided by those of its keys and values in 16 bits.
        gain_groups: Number of groups of channels with gains.
        record: Keeps the fits.
    """

    def __init__(self, budget: float, gain_groups: int, record: Record) -> None:
        self._budget, self._gain_groups, self.record = budget, gain_groups, record
        self._fits: dict[int, VectorFit] = {}
        self._sizes: dict[int, int] = {}
        self._errors: dict[int, dict[int, float]] = {}

    def add(self, layer: int, calibration: Calibration, weight: float) -> None:
        """Fit a layer.

        Args:
            layer: Index of the layer.
            calibration: Measurements at the layer.
            weight: Weight of a squared error in the layer's output; it makes those of different layers comparable.
        """
        size = _size(self._budget, calibration.source.geometry.source_cache_numbers, self._gain_groups)
        kept = self.record.tensors(f"layer {layer}")
        fit = layer_fit(calibration, size, self._gain_groups, kept)
        if kept is None:
            self.record.keep_tensors(f"layer {layer}", {**vars(fit.axes), **vars(fit.table)})
        smallest = (GAIN_BITS * self._gain_groups + GRANULE) // 8
        tried = sorted({max(smallest, round(share * size)) for share in REACH})
        self._fits[layer], self._sizes[layer] = fit, size
        self._errors[layer] = {one: weight * fit.error(one) for one in tried}

    def moved(self, layer: int, vectors: Tensor, gradients: Tensor) -> float:
        """Return by how much codes of the mean size in a layer move the predictions, in nats.

        Args:
            layer: Index of the layer.
            vectors: Keys and values of old tokens, [T, w].
            gradients: The gradients of what is read in their place, [T, w]; see `Gradients`.
        """
        codec = self._fits[layer].codec(self._sizes[layer], refits=0).to(vectors.device)
        off = codec.decode(codec.encode(vectors)) - vectors
        return float((gradients * off).sum(-1).double().square().mean()) / 2

    def weigh(self, layer: int, moved: float) -> None:
        """Scale the errors of a layer so that the one at the mean size is what it moves the predictions by."""
        self._errors[layer] = scaled(self._errors[layer], self._sizes[layer], moved)

    def codecs(self, processes: Processes = ALONE) -> dict[int, VectorCodec]:
        """Return the codec of each layer, with the bytes of all shared out so that the sum of errors is small."""
        shares = processes.broadcast(allocate(self._errors, sum(self._sizes.values())))
        return {layer: fit.codec(shares[layer]) for layer, fit in self._fits.items()}


def codable_layers(config: PreTrainedConfig, layers: LayerChoice = "all") -> tuple[int, ...]:
    """Return the indices of the layers of a model whose caches can be coded, in rising order.

    Args:
        config: The config of the source model.
        layers: The layers that the user chose, as in `MLATransformation`.

    Raises:
        InvalidValueError: The choice is malformed, or a chosen layer has a sliding window.
        UnsupportedModelError: The model is converted, all of its layers have windows, or its rotary frequencies depend
            on the length of the text.
    """
    if is_converted(config):
        raise UnsupportedModelError("model: its attention is converted already. Fit a codec to the source model.")
    family_of(config)
    kind = rope_type(config)
    if kind in ("dynamic", "longrope"):
        raise UnsupportedModelError(
            f"model: its rotary frequencies depend on the length ({kind}), so cached keys cannot be turned back. Use "
            "--kv-cache-ratio, or a quantized cache."
        )
    full = [layer for layer in range(config.num_hidden_layers) if sliding_window(config, layer) is None]
    if not full:
        raise UnsupportedModelError(
            "model: all of its layers have a sliding window, which bounds their cache by itself. Use --kv-cache-ratio."
        )
    if layers == "all":
        return tuple(full)
    chosen = parse_layers(layers, config.num_hidden_layers)
    if windowed := sorted(set(chosen) - set(full)):
        raise InvalidValueError("layers", windowed[0], "layers without a sliding window under a budget of bytes")
    return chosen


def _size(budget: float, numbers: int, gain_groups: int) -> int:
    """Return the bytes of a token's codes in a layer that caches so many numbers.

    Raises:
        InvalidValueError: They leave no room for a channel.
    """
    size, least = int(2 * budget * numbers + 1e-6), (GAIN_BITS * gain_groups + GRANULE) // 8
    if size < least:
        low = least / (2 * numbers)
        raise InvalidValueError("kv_cache_budget", budget, f"{low:.3g} to {LARGEST_BUDGET} for this model")
    return size


def layer_fit(
    calibration: Calibration, size: int, gain_groups: int = GAIN_GROUPS, kept: dict[str, Tensor] | None = None
) -> VectorFit:
    """Return what fits codecs of about so many bytes to the keys and values of a layer, [key ; value] unrotated.

    The axes of the latent make errors of different channels add up in the hidden state after the attention, to first
    order, and hold as much as possible in few channels.

    Args:
        calibration: Measurements at the layer.
        size: See `VectorFit`.
        gain_groups: See `VectorFit`.
        kept: The fields of the axes and of the table that an earlier run of the same arguments found.
    """
    source: SourceAttention = calibration.source
    heads = source.project(calibration.inputs()[None])
    vectors = torch.cat([part[0].transpose(0, 1).flatten(1) for part in (heads.key, heads.value)], dim=1)
    if kept is not None:
        known = {name: tensor.to(vectors.device) for name, tensor in kept.items()}
        table = CodeTable(known.pop("errors"), known.pop("steps"))
        return VectorFit(Axes(**known), vectors, size, gain_groups, table)
    g = source.geometry
    width = g.num_key_value_heads * g.head_dim
    eye = torch.eye(2 * width, dtype=torch.float64, device=vectors.device)
    # The factor of a key norm is part of the keys here.
    moments = calibration.query_moments
    readers = key_moments(source, moments, rotating=True) / moments.key_scale[:, None, None]
    rows = [WeightedRows(eye[:width], readers), WeightedRows(eye[width:], value_moments(source))]
    factors = WeightedFactorization(rows, vectors.double().T.cov(correction=0)).factors(2 * width)
    return VectorFit(Axes(factors.down, torch.cat(factors.ups), factors.costs), vectors, size, gain_groups)
