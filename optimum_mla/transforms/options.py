"""Checks of options that several methods share."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from optimum_mla.errors import InvalidValueError


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


def choose_selection(received: str | None, allowed: Sequence[str], calibration: Tensor | None, fallback: str) -> str:
    """The rotary selection: the caller's, else `contribution` where it can be measured, else `fallback`."""
    if received is None:
        return "contribution" if calibration is not None and "contribution" in allowed else fallback
    check_choice("rope_selection", received, allowed)
    if received == "contribution" and calibration is None:
        others = ", ".join(name for name in allowed if name != "contribution")
        raise InvalidValueError(
            "rope_selection",
            received,
            f"{others} without calibration tokens",
            "Give calibration data, or another selection.",
        )
    return received
