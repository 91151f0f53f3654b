"""Choice of the same number of rotary dims and the same frequencies for all layers, which inference engines need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from optimum_mla.calibrate.layer import LayerCalibration
from optimum_mla.calibrate.walk import CalibrationWalk
from optimum_mla.convert.search import LayerSearch
from optimum_mla.core.geometry import MLAGeometry
from optimum_mla.core.progress import progress
from optimum_mla.methods.base import MLATransformation
from optimum_mla.methods.shared_rope import SharedRope


def choose_shared_rope(
    method: MLATransformation, walk: CalibrationWalk, layers: Sequence[int], plans: Mapping[int, MLAGeometry]
) -> SharedRope:
    """Return the number of rotary dims with the least squared error, and the frequencies that would do the most damage.

    Errors and damages are summed over all layers.

    Args:
        method: The transformation.
        walk: A calibration walk that stands before the first layer.
        layers: The indices of the layers to convert.
        plans: The planned shapes, by the index of the layer.
    """
    errors: dict[int, list[float]] = {}
    damages = []
    for layer in progress(layers, f"{method.name}: rotary dims", main=True):
        while walk.layer < layer:
            walk.advance()
        source = walk.model.attention(layer)
        search = LayerSearch(method, walk.model, layer, source, LayerCalibration(walk, source))
        damages.append(method.rotary_damage(source, search.calibration))
        shapes = method.candidates(source, plans[layer])
        for shape in shapes:
            error = search.error(shape) ** 2 if len(shapes) > 1 else 0.0
            errors.setdefault(shape.qk_rope_head_dim, []).append(error)
    everywhere = [dims for dims, found in errors.items() if len(found) == len(layers)]
    dims = min(everywhere, key=lambda dims: sum(errors[dims]))
    total = torch.stack(damages).sum(0)
    pairs = total.shape[1]
    chosen = total.flatten().topk(dims // 2).indices % pairs
    return SharedRope(dims, torch.bincount(chosen, minlength=pairs))
