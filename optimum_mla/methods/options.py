"""Checks of options that several methods share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from optimum_mla.calibrate.calibration import Calibration
from optimum_mla.calibrate.statistics_folder import CalibrationStatistics
from optimum_mla.core.errors import InvalidValueError
from optimum_mla.core.geometry import MLAGeometry
from optimum_mla.core.number_checks import check_choice, check_integer
from optimum_mla.models import SourceAttention
from optimum_mla.ops.rope_mix import identity_mix
from optimum_mla.ops.rope_split import SCORED_SELECTIONS


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


def choose_selection(
    received: str | None, allowed: Sequence[str], calibration: Tensor | CalibrationStatistics | None, fallback: str
) -> str:
    """Return the rule that selects rotary dims.

    Args:
        received: The caller's rule, or None, which takes `damage` if it can be measured, and `fallback` otherwise.
        allowed: The rules of the method.
        calibration: The calibration tokens or statistics, or None.
        fallback: The rule without calibration tokens.

    Raises:
        InvalidValueError: The method has no such rule, or the rule needs calibration tokens.
    """
    if received is None:
        return "damage" if calibration is not None and "damage" in allowed else fallback
    check_choice("rope_selection", received, allowed)
    if received in SCORED_SELECTIONS and calibration is None:
        others = ", ".join(name for name in allowed if name not in SCORED_SELECTIONS)
        raise InvalidValueError(
            "rope_selection",
            received,
            f"{others} without calibration tokens",
            "Give calibration data, or another selection.",
        )
    return received


def pair_scores(selection: str, source: SourceAttention, calibration: Calibration | None) -> Tensor | None:
    """Return the scores of all rotary pairs by which a selection chooses, [G, D/2]; None if it needs no scores."""
    if calibration is None or selection not in SCORED_SELECTIONS:
        return None
    if selection not in calibration.memo:
        if selection == "contribution":
            scores = calibration.contribution()
        else:
            g = source.geometry
            mix = identity_mix(g.num_key_value_heads, g.head_dim // 2, source.key.device)
            scores = calibration.damage(mix).unflatten(0, (g.num_key_value_heads, -1))
        calibration.memo[selection] = scores
    return calibration.memo[selection]


def rope_dims(head_dim: int) -> list[int]:
    """Return the numbers of rotary dims per head that calibration chooses from: 1/8, 1/4, 3/8, 1/2 and 3/4 of D."""
    eighths = {max(2, head_dim * share // 8 // 2 * 2) for share in (1, 2, 3, 4, 6)}
    return sorted(rope for rope in eighths if rope <= head_dim - 2)
