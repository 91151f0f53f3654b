"""Choice of the same number of rotary dims and the same frequencies for all layers, which inference engines need."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from optimum_mla.calibrate.statistics import StoredCalibration
from optimum_mla.convert.first_pass import FirstPass
from optimum_mla.convert.method import ConversionMethod
from optimum_mla.core.geometry import MLAGeometry
from optimum_mla.core.processes import ALONE, Processes
from optimum_mla.core.progress import progress
from optimum_mla.ops.shared_rope import SharedRope, irregular, regular_pairs

TINY = 1e-12
"""Added to errors and divergences, which are zero where nothing is lost."""


def choose_shared_rope(
    method: ConversionMethod, first: FirstPass, plans: Mapping[int, MLAGeometry], processes: Processes = ALONE
) -> SharedRope:
    """Return the number of rotary dims with the least error, and the frequencies that would do the most damage.

    Errors and damages of a layer are squares without a unit. They are summed over all layers in units of what they do
    to the model's predictions, which one conversion of each layer tells where there are tokens to measure on. With a
    regular `shared_rope` the frequencies follow from the number.

    Args:
        method: The transformation.
        first: The pass over the source, which gives the search of each layer.
        plans: The planned shapes of the layers to convert, by the index of the layer.
        processes: The processes that share the work.

    Raises:
        InvalidValueError: No number of rotary dims of these shapes gives regular frequencies.
    """
    errors: dict[int, dict[int, float]] = {}
    damages: dict[int, Tensor] = {}
    weights: dict[int, float] = {}
    for layer in progress(plans, f"{method.name}: rotary dims", main=True):
        tried = first.search(layer)
        damages[layer] = method.rotary_damage(tried.source, tried.calibration)
        shapes = method.candidates(tried.source, plans[layer])
        errors[layer] = processes.broadcast({shape.qk_rope_head_dim: tried.squared_error(shape) for shape in shapes})
        best = min(shapes, key=lambda shape: errors[layer][shape.qk_rope_head_dim])
        if isinstance(tried.calibration, StoredCalibration):
            weights[layer] = tried.calibration.state_weight
        else:
            first.replace(tried.attention(*tried.convert(best)))
    for layer, divergence in first.divergences(f"{method.name}: effect on the predictions").items():
        weights[layer] = (divergence + TINY) / (min(errors[layer].values()) + TINY)
    total = torch.stack([weights[layer] * damage for layer, damage in damages.items()]).sum(0)
    pairs = total.shape[1]
    everywhere = [dims for dims in next(iter(errors.values())) if all(dims in found for found in errors.values())]
    if method.shared_rope == "regular":
        everywhere = [dims for dims in everywhere if not 2 * pairs % dims]
        if not everywhere:
            raise irregular(pairs, max(dims for found in errors.values() for dims in found))
    dims = min(everywhere, key=lambda dims: sum(weights[layer] * found[dims] for layer, found in errors.items()))
    if method.shared_rope == "regular":
        return SharedRope(dims, torch.bincount(regular_pairs(pairs, dims), minlength=pairs))
    chosen = total.flatten().topk(dims // 2).indices % pairs
    return SharedRope(dims, torch.bincount(chosen, minlength=pairs))
