"""One rotary key for a whole model: as many dims, at the same frequencies, in every layer, as engines want it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optimum_mla.geometry import MLAGeometry
from optimum_mla.models import Family, SourceAttention
from optimum_mla.progress import progress
from optimum_mla.transforms.calibration import CalibrationWalk
from optimum_mla.transforms.search import LayerSearch

if TYPE_CHECKING:
    from optimum_mla.transforms.base import MLATransformation


@dataclass(frozen=True)
class SharedRope:
    """What all layers rotate.

    Attributes:
        dims: R.
        counts: [D/2], how many rotary pairs turn with each frequency of the source; R/2 in all.
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
    """The R with the least squared error over all layers, and the frequencies whose loss would do the most damage.

    Args:
        method: The transformation; layer by layer it would choose for itself.
        family: The model's.
        walk: Before the first layer.
        sources: The attention of every layer to convert.
        plans: Their shapes so far.
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
