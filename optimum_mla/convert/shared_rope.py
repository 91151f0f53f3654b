"""Choice of the same number of rotary dims and the same frequencies for all layers, which inference engines need."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from optimum_mla.convert.search import LayerSearch
from optimum_mla.core.errors import InvalidValueError
from optimum_mla.core.geometry import MLAGeometry
from optimum_mla.core.progress import progress
from optimum_mla.methods.base import MLATransformation
from optimum_mla.methods.shared_rope import SharedRope


def choose_shared_rope(
    method: MLATransformation, search: Callable[[int], LayerSearch], plans: Mapping[int, MLAGeometry]
) -> SharedRope:
    """Return the number of rotary dims with the least squared error, and the frequencies that would do the most damage.

    Errors and damages are summed over all layers. With a regular `shared_rope` the frequencies follow from the number.

    Args:
        method: The transformation.
        search: Returns the search of a layer; the layers are asked for in order.
        plans: The planned shapes of the layers to convert, by the index of the layer.

    Raises:
        InvalidValueError: No number of rotary dims of these shapes gives regular frequencies.
    """
    errors: dict[int, list[float]] = {}
    damages = []
    for layer in progress(plans, f"{method.name}: rotary dims", main=True):
        tried = search(layer)
        damages.append(method.rotary_damage(tried.source, tried.calibration))
        shapes = method.candidates(tried.source, plans[layer])
        for shape in shapes:
            error = tried.squared_error(shape) if len(shapes) > 1 else 0.0
            errors.setdefault(shape.qk_rope_head_dim, []).append(error)
    total = torch.stack(damages).sum(0)
    pairs = total.shape[1]
    everywhere = [dims for dims, found in errors.items() if len(found) == len(plans)]
    if method.shared_rope == "regular":
        everywhere = [dims for dims in everywhere if not 2 * pairs % dims]
        if not everywhere:
            divisors = ", ".join(str(2 * n) for n in range(1, pairs + 1) if not pairs % n)
            raise InvalidValueError("qk_rope_head_dim", max(errors), f"{divisors} with a regular shared_rope")
    dims = min(everywhere, key=lambda dims: sum(errors[dims]))
    if method.shared_rope == "regular":
        regular = torch.zeros(pairs, dtype=torch.long)
        regular[:: 2 * pairs // dims] = 1
        return SharedRope(dims, regular)
    chosen = total.flatten().topk(dims // 2).indices % pairs
    return SharedRope(dims, torch.bincount(chosen, minlength=pairs))
