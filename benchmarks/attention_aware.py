"""Codes of keys and values apart, with bits by what attention sees of their errors, after AATC (arXiv 2608.14191).

What the paper's abstract says is done: the error of a code is what it does to the attention's output, to which keys and
values add separately and channel by channel; both are transformed so that this error gathers in few channels, and bits
are shared by reverse water-filling, here within each layer, and between layers by greedy steps. Errors of a layer are
taken relative to the size of the hidden state there. Codes, first and newest tokens and the cache are those of this
project, without gains and without entropy coding, so what differs are the axes and the bits alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optimum_mla.calibrate.layer import LayerCalibration
from optimum_mla.calibrate.walk import CalibrationWalk
from optimum_mla.calibrate.weighting import key_moments, value_moments
from optimum_mla.codec.fit import CodeTable
from optimum_mla.codec.fit_vectors import Axes, VectorFit
from optimum_mla.models.codec import ModelCodec, probe_of
from optimum_mla.models.layer_source import LayerSource
from optimum_mla.ops.weighted import WeightedFactorization, WeightedRows
from optimum_mla.plan.allocation import allocate

REACH = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8)
"""Sizes at which the error of a layer's codes is computed, as multiples of the mean size."""


@torch.no_grad()
def attention_aware_codec(model: Any, windows: Tensor, kv_cache_budget: float) -> ModelCodec:
    """Return a codec with bits by what attention sees.

    Args:
        model: A causal language model without sliding windows.
        windows: Token ids, [N, L].
        kv_cache_budget: Bytes of the codes of a token, divided by those of the source's cache in 16 bits.
    """
    walk = CalibrationWalk(LayerSource(model), windows)
    fits: dict[int, VectorFit] = {}
    sizes: dict[int, int] = {}
    weights: dict[int, float] = {}
    for layer in range(walk.model.num_layers):
        calibration = LayerCalibration(walk, walk.model.attention(layer))
        heads = calibration.source.project(calibration.inputs()[None])
        moments = calibration.query_moments
        readers = key_moments(calibration.source, moments, rotating=True) / moments.key_scale[:, None, None]
        parts = [part[0].transpose(0, 1).flatten(1) for part in (heads.key, heads.value)]
        halves = [_axes(*pair) for pair in zip(parts, (readers, value_moments(calibration.source)), strict=True)]
        downs, ups, costs = zip(*halves, strict=True)
        axes = Axes(torch.block_diag(*downs), torch.block_diag(*ups), torch.cat(costs))
        vectors = torch.cat(parts, dim=1)
        # Channels of like error stand together, because eight neighbours have the same bits.
        latents = ((vectors.double() - vectors.double().mean(0)) @ axes.down.T).float()
        order = CodeTable.fit(latents, axes.costs).errors[:, 0].argsort(descending=True)
        sizes[layer] = int(2 * kv_cache_budget * vectors.shape[1])
        axes = Axes(axes.down[order], axes.up[:, order], axes.costs[order])
        fits[layer] = VectorFit(axes, vectors, sizes[layer], gain_groups=0)
        weights[layer] = float(walk.row_weights.double().mean())
        walk.advance()
    errors = {
        layer: {
            size: weights[layer] * fit.error(size)
            for size in sorted({max(1, round(share * sizes[layer])) for share in REACH})
        }
        for layer, fit in fits.items()
    }
    shares = allocate(errors, sum(sizes.values()))
    layers = {layer: fit.codec(shares[layer]) for layer, fit in fits.items()}
    probes = {layer: probe_of(model, layer) for layer in layers}
    return ModelCodec(layers, probes, model.config.model_type)


def _axes(vectors: Tensor, readers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the factors of the axes of keys or of values, [w, w] each, and the costs of their channels, [w].

    Args:
        vectors: Keys or values, [T, w].
        readers: Second moments of what reads each head, [G, D, D].
    """
    width = vectors.shape[1]
    eye = torch.eye(width, dtype=torch.float64, device=vectors.device)
    found = WeightedFactorization([WeightedRows(eye, readers)], vectors.double().T.cov(correction=0)).factors(width)
    return found.down, found.ups[0], found.costs
