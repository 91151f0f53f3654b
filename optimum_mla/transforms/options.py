"""Checks of options that several methods share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from optimum_mla.errors import InvalidValueError
from optimum_mla.geometry import MLAGeometry
from optimum_mla.models import SourceAttention
from optimum_mla.ops.rope_mix import identity_mix
from optimum_mla.ops.rope_split import SCORED_SELECTIONS
from optimum_mla.transforms.calibration import LayerCalibration


def check_choice(field: str, received: str, allowed: Sequence[str]) -> None:
    """Raise `InvalidValueError` unless `received` is one of `allowed`."""
    if received not in allowed:
        raise InvalidValueError(field, received, ", ".join(allowed))


def check_rope_dim(received: int | None, head_dim: int, default: int, only_divisors: bool = False) -> int:
    """R, checked: even and from 2 to D - 2 (a head needs both kinds of dims); `default` rounded to even if not given.

    Args:
        received: The caller's R or None.
        head_dim: D.
        default: R where none is given.
        only_divisors: Whether R must divide D.
    """
    if received is None:
        return max(2, default // 2 * 2)
    if received % 2 or not 2 <= received <= head_dim - 2 or (only_divisors and head_dim % received):
        kind = f"even divisors of {head_dim} below it" if only_divisors else f"even integers from 2 to {head_dim - 2}"
        raise InvalidValueError("qk_rope_head_dim", received, f"{kind} (the model's head dim is {head_dim})")
    return received


def fitting(shape: Callable[[int], MLAGeometry], rope_dims: Iterable[int]) -> list[MLAGeometry]:
    """The shapes with these rotary dims, as far as the budget leaves room beside the rotary key."""
    shapes = []
    for rope_dim in rope_dims:
        try:
            shapes.append(shape(rope_dim))
        except InvalidValueError:
            break
    return shapes


def choose_selection(received: str | None, allowed: Sequence[str], calibration: Tensor | None, fallback: str) -> str:
    """The rotary selection: the caller's, else `damage` where it can be measured, else `fallback`."""
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


def pair_scores(selection: str, source: SourceAttention, calibration: LayerCalibration | None) -> Tensor | None:
    """What a scored selection goes by, [G, D/2]; None for the other selections."""
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
    """Rotary dims per head to choose from: eighths of the head dim."""
    eighths = {max(2, head_dim * share // 8 // 2 * 2) for share in (1, 2, 3, 4, 6)}
    return sorted(rope for rope in eighths if rope <= head_dim - 2)
