"""Checks of options, and searches for shapes, that several methods share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from optimum_mla.core.errors import InvalidValueError
from optimum_mla.core.geometry import MLAGeometry
from optimum_mla.core.number_checks import check_integer
from optimum_mla.plan.budget import RankBudget


def check_rope_dim(received: int | None, head_dim: int, default: int, only_divisors: bool = False) -> int:
    """Return the number of rotary dims per head, R, after checking it.

    R is even and from 2 to D - 2, because a head needs dims of both kinds.

    Args:
        received: The caller's R, or None.
        head_dim: D.
        default: Taken where the caller gives none, rounded down to an even number.
        only_divisors: Whether R must divide D.

    Raises:
        InvalidValueError: R is not an integer or out of range.
    """
    if received is None:
        return max(2, default // 2 * 2)
    kind = f"even divisors of {head_dim} below it" if only_divisors else f"even integers from 2 to {head_dim - 2}"
    allowed = f"{kind} (the model's head dim is {head_dim})"
    check_integer("qk_rope_head_dim", received, allowed)
    if received % 2 or not 2 <= received <= head_dim - 2 or (only_divisors and head_dim % received):
        raise InvalidValueError("qk_rope_head_dim", received, allowed)
    return received


def calibrated_rank(budget: RankBudget, geometry: MLAGeometry, overhead: int, largest: int) -> int:
    """Return the planned rank of a calibrated latent; the arguments are those of `RankBudget.rank`.

    Under an energy budget it is the largest one, until the weighted energies of the measured layer set it.
    """
    if budget.energy is not None:
        return largest
    return budget.rank(geometry.source_cache_numbers, overhead, largest, lambda: torch.empty(0))


def rope_choices(head_dim: int, shares: Sequence[float], most: int) -> list[int]:
    """Return rotary dims that are some shares of the head dim: even numbers from 2 to `most`, rising."""
    return sorted(rope for rope in {max(2, int(share * head_dim) // 2 * 2) for share in shares} if rope <= most)


def shapes_that_fit(shape: Callable[[int], MLAGeometry], rope_dims: Iterable[int]) -> list[MLAGeometry]:
    """Return the shapes with these rotary dims, up to the first whose rotary key leaves no room for a latent.

    Args:
        shape: Returns the shape of a layer for a number of rotary dims, or raises `InvalidValueError`.
        rope_dims: Rotary dims per head, rising.
    """
    shapes = []
    for rope_dim in rope_dims:
        try:
            shapes.append(shape(rope_dim))
        except InvalidValueError:
            break
    return shapes
