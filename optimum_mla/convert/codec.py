"""Fits the codec of a model in one pass over a text: the source's own states, no refits, no candidates."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_mla.cache.codec_layer import EXACT_TOKENS, ExactTokens
from optimum_mla.calibrate.calibration import Calibration
from optimum_mla.calibrate.coded_attention import CodedAttention
from optimum_mla.calibrate.layer import LayerCalibration
from optimum_mla.calibrate.sensitivity import Sensitivity
from optimum_mla.calibrate.walk import CalibrationWalk
from optimum_mla.calibrate.windows import check_tokens
from optimum_mla.codec.fit_vectors import Axes, VectorFit
from optimum_mla.codec.layout import GAIN_BITS, GAIN_GROUPS
from optimum_mla.core.errors import InvalidValueError, UnsupportedModelError
from optimum_mla.core.number_checks import check_number
from optimum_mla.core.progress import progress
from optimum_mla.core.segments import GRANULE
from optimum_mla.families.project import SourceAttention
from optimum_mla.families.spec import sliding_window
from optimum_mla.methods.weighting import key_moments, value_moments
from optimum_mla.models.checks import config_of
from optimum_mla.models.codec import ModelCodec, probe_of
from optimum_mla.models.layer_source import LayerSource
from optimum_mla.models.registry import is_converted
from optimum_mla.ops.weighted import WeightedFactorization, WeightedRows
from optimum_mla.plan.allocation import allocate_ranks, scaled

LARGEST_BUDGET = 0.5
REACH = (0.5, 0.7, 1.0, 1.4, 2.0)
"""Sizes at which the error of a layer's codes is computed, as multiples of the mean size."""


@torch.no_grad()
def fit_codec(
    model: PreTrainedModel,
    windows: Tensor,
    kv_cache_budget: float = 0.125,
    gain_groups: int = GAIN_GROUPS,
    exact: ExactTokens = EXACT_TOKENS,
) -> ModelCodec:
    """Return a codec for the keys and values of a model, whose weights stay as they are.

    Bytes are shared between layers by how far the predictions move if old tokens of one layer alone come from codes.

    Args:
        model: A causal language model with plain projections.
        windows: Token ids of ordinary text, [N, L]. Windows have to be longer than the tokens that stay exact.
        kv_cache_budget: Bytes of the codes of a token, divided by those of the source's cache in 16 bits, above 0 and
            up to 0.5, in the layers with full attention. Layers with a sliding window keep their cache.
        gain_groups: Number of groups of channels that have a gain in each token, 0 or a multiple of 8.
        exact: Which tokens are never read from codes.

    Raises:
        InvalidValueError: A value is out of range, or the budget leaves no room for a channel.
        UnsupportedModelError: The model is converted already, its rotary frequencies depend on the length, or it cannot
            be read; see `LayerSource`.
        CalibrationDataError: The windows say nothing.
    """
    config = config_of(model)
    check_number("kv_cache_budget", kv_cache_budget, f"above 0, up to {LARGEST_BUDGET}")
    if not 0 < kv_cache_budget <= LARGEST_BUDGET:
        raise InvalidValueError("kv_cache_budget", kv_cache_budget, f"above 0, up to {LARGEST_BUDGET}")
    if is_converted(config):
        raise UnsupportedModelError("model: its attention is converted already. Fit a codec to the source model.")
    check_tokens(windows, config.vocab_size)
    least = exact.sinks + exact.recent
    if windows.shape[1] <= least:
        raise InvalidValueError("windows", f"{windows.shape[1]} tokens each", f"more than {least}, which stay exact")
    source = LayerSource(model)
    if getattr(source.rotary, "rope_type", "default") in ("dynamic", "longrope"):
        raise UnsupportedModelError(
            f"model: its rotary frequencies depend on the length ({source.rotary.rope_type}), so cached keys cannot be "
            "turned back. Use --kv-cache-ratio, or a quantized cache."
        )
    walk = CalibrationWalk(source, windows)
    reached = Sensitivity(walk)
    fits: dict[int, VectorFit] = {}
    curves: dict[int, dict[int, float]] = {}
    sizes: dict[int, int] = {}
    for layer in progress(range(source.num_layers), "codec: layers", main=True):
        if sliding_window(config, layer) is None:
            attention = source.attention(layer)
            width = attention.geometry.source_cache_numbers
            sizes[layer] = _size(kv_cache_budget, width, gain_groups)
            fit = fits[layer] = layer_fit(LayerCalibration(walk, attention), sizes[layer], gain_groups)
            smallest = (GAIN_BITS * gain_groups + GRANULE) // 8
            tried = {max(smallest, round(share * sizes[layer])) for share in REACH}
            curves[layer] = {size: fit.error(size) for size in sorted(tried)}
            codec = fit.codec(sizes[layer])
            reached.replace(CodedAttention(attention, codec, exact, walk.mask, walk.dtype))
        reached.advance()
    if not fits:
        raise UnsupportedModelError(
            "model: all of its layers have a sliding window, which bounds their cache by itself."
        )
    apart = reached.divergences("codec: effect on the predictions")
    weighed = {layer: scaled(curve, sizes[layer], apart[layer]) for layer, curve in curves.items()}
    shared = allocate_ranks(weighed, sum(sizes.values()))
    layers = {layer: fit.codec(shared[layer]) for layer, fit in fits.items()}
    return ModelCodec(layers, {layer: probe_of(model, layer) for layer in layers}, config.model_type, exact)


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


def layer_fit(calibration: Calibration, size: int, gain_groups: int = GAIN_GROUPS) -> VectorFit:
    """Return what fits codecs of about so many bytes to the keys and values of a layer, [key ; value] unrotated.

    The axes of the latent make errors of different channels add up in the hidden state after the attention, to first
    order, and hold as much as possible in few channels.
    """
    source: SourceAttention = calibration.source
    heads = source.project(calibration.inputs()[None])
    vectors = torch.cat([part[0].transpose(0, 1).flatten(1) for part in (heads.key, heads.value)], dim=1)
    g = source.geometry
    width = g.num_key_value_heads * g.head_dim
    eye = torch.eye(2 * width, dtype=torch.float64, device=vectors.device)
    # The factor of a key norm is part of the keys here.
    scale = calibration.moments.key_scale[:, None, None]
    readers = key_moments(source, calibration, rotating=True) / scale
    rows = [WeightedRows(eye[:width], readers), WeightedRows(eye[width:], value_moments(source))]
    factors = WeightedFactorization(rows, vectors.double().T.cov(correction=0)).factors(2 * width)
    return VectorFit(Axes(factors.down, torch.cat(factors.ups), factors.costs), vectors, size, gain_groups)
