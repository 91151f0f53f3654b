"""Checks of the values of options, before anything compares them. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from optimum_mla.core.errors import InvalidValueError

LARGEST_COUNT = 2**63 - 1
"""The largest number that the libraries count with."""
LARGEST_SEED = 2**32 - 1
"""The largest seed that all libraries take."""


def check_choice(field: str, received: str, allowed: Sequence[str]) -> None:
    """Raise `InvalidValueError` unless `received` is one of `allowed`."""
    if received not in allowed:
        raise InvalidValueError(field, received, ", ".join(allowed))


def check_integer(field: str, received: object, allowed: str) -> None:
    """Refuse a value that is not an integer; a boolean is none.

    Args:
        field: Name of the option.
        received: Its value.
        allowed: The values that the option takes, for the message.

    Raises:
        InvalidValueError: The value is not an integer.
    """
    if not isinstance(received, int) or isinstance(received, bool):
        raise InvalidValueError(field, received, allowed, f"Give an integer, not a {type(received).__name__}.")


def check_number(field: str, received: object, allowed: str) -> None:
    """Refuse a value that is not an integer or a float; a boolean is none.

    Args:
        field: Name of the option.
        received: Its value.
        allowed: The values that the option takes, for the message.

    Raises:
        InvalidValueError: The value is not a number.
    """
    if not isinstance(received, int | float) or isinstance(received, bool):
        raise InvalidValueError(field, received, allowed, f"Give a number, not a {type(received).__name__}.")


def check_count(field: str, received: Any, least: int = 1, most: int = LARGEST_COUNT) -> None:
    """Refuse a value that is not an integer of a range, as for numbers of things and for seeds.

    Args:
        field: Name of the option.
        received: Its value.
        least: The smallest value that is allowed.
        most: The largest value that is allowed.

    Raises:
        InvalidValueError: The value is not an integer, or out of the range.
    """
    allowed = f"integers from {least}"
    check_integer(field, received, allowed)
    if received > most:
        raise InvalidValueError(field, received, f"{allowed} to {most}")
    if received < least:
        raise InvalidValueError(field, received, allowed)


def check_finite(field: str, received: Any, above: bool = False, below: float = math.inf) -> None:
    """Refuse a value that is not a finite number from 0 on; nan and infinity are none.

    Args:
        field: Name of the option.
        received: Its value.
        above: Whether 0 itself is refused too.
        below: The value has to be less than this.

    Raises:
        InvalidValueError: The value is not a number, not finite, or out of the range.
    """
    least = f"numbers {'above' if above else 'from'} 0"
    allowed = f"finite {least}" if below == math.inf else f"{least}, below {below:g}"
    check_number(field, received, allowed)
    if not 0 <= received < below or (above and received == 0):
        raise InvalidValueError(field, received, allowed)
