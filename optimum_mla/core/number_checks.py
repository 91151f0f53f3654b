"""Checks that a numeric option holds a number, before anything compares it. Imports no torch."""

from __future__ import annotations

from optimum_mla.core.errors import InvalidValueError


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
