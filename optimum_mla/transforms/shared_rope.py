"""Choice of the same number of rotary dims and the same frequencies for all layers, which inference engines need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optimum_mla.core.geometry import MLAGeometry
from optimum_mla.core.progress import progress
from optimum_mla.models import Family, SourceAttention
from optimum_mla.transforms.calibration import CalibrationWalk
from optimum_mla.transforms.search import LayerSearch

if TYPE_CHECKING:
    from optimum_mla.transforms.base import MLATransformation


@dataclass(frozen=True)
class SharedRope:
    """The rotary dims that all layers share.

    Attributes:
        dims: R, the number of rotary dims.
        counts: Number of rotary pairs that rotate with each of the source's frequencies, [D/2], R/2 in total.
    """

    dims: int
    counts: Tensor


def choose_shared_rope(
    method: MLATransformation,
    family: Family,
    walk: CalibrationWalk,
    sources: dict[int, SourceAttention],
    plans: dict[int, MLAGeometry],
) -> SharedRope:
    """Return the number of rotary dims with the least squared error, and the frequencies that would do the most damage.

    Errors and damages are summed over all layers.

    Args:
        method: The transformation.
        family: The model's family.
        walk: A calibration walk that stands before the first layer.
        sources: The attention of every layer to convert, by the index of the layer.
        plans: The planned shapes, by the index of the layer.
    """
    errors: dict[int, list[float]] = {}
    damages = []
    for layer, source in progress(sources.items(), f"{method.name}: rotary dims"):
        while walk.layer < layer:
            walk.advance()
        search = LayerSearch(method, family, walk.model, layer, source, walk.calibrate(source))
        damages.append(method.rotary_damage(source, search.calibration))
        shapes = method.candidates(source, plans[layer])
        for shape in shapes:
            error = search.error(shape) ** 2 if len(shapes) > 1 else 0.0
            errors.setdefault(shape.qk_rope_head_dim, []).append(error)
    everywhere = [dims for dims, found in errors.items() if len(found) == len(sources)]
    dims = min(everywhere, key=lambda dims: sum(errors[dims]))
    total = torch.stack(damages).sum(0)
    pairs = total.shape[1]
    chosen = total.flatten().topk(dims // 2).indices % pairs
    return SharedRope(dims, torch.bincount(chosen, minlength=pairs))
