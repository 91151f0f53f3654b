"""A numeric option that holds something else is one line that says what it takes."""

from __future__ import annotations

import math
from typing import Any

import pytest

from optimum_mla.cache import CacheSettings
from optimum_mla.core.errors import InvalidValueError
from optimum_mla.core.number_checks import LARGEST_COUNT, check_count, check_finite, check_integer, check_number
from optimum_mla.methods.options import check_rope_dim
from optimum_mla.plan.budget import RankBudget


@pytest.mark.parametrize("value", ["8", True, 8.0, None, [8]])
def test_what_is_no_integer_is_refused(value: Any) -> None:
    with pytest.raises(InvalidValueError, match=r"^rank: got .*, allowed: 1 to 9\. Give an integer, not a "):
        check_integer("rank", value, "1 to 9")


@pytest.mark.parametrize("value", ["0.5", False, None, (0.5,)])
def test_what_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(InvalidValueError, match=r"^share: got .*, allowed: up to 1\. Give a number, not a "):
        check_number("share", value, "up to 1")


def test_numbers_pass() -> None:
    check_integer("rank", 8, "1 to 9")
    check_number("share", 1, "up to 1")
    check_number("share", 0.5, "up to 1")


@pytest.mark.parametrize(
    ("value", "least", "most", "allowed"),
    [
        (0, 1, LARGEST_COUNT, "integers from 1"),
        (-1, 0, 7, "integers from 0"),
        (8, 0, 7, "integers from 0 to 7"),
        (10**26, 1, LARGEST_COUNT, "integers from 1 to 9223372036854775807"),
        (2.0, 1, LARGEST_COUNT, "integers from 1. Give an integer, not a float"),
        (math.nan, 1, LARGEST_COUNT, "integers from 1. Give an integer, not a float"),
    ],
)
def test_counts_have_both_ends(value: Any, least: int, most: int, allowed: str) -> None:
    with pytest.raises(InvalidValueError) as caught:
        check_count("windows", value, least, most)
    assert str(caught.value) == f"windows: got {value!r}, allowed: {allowed}."
    for good in (least, most):
        check_count("windows", good, least, most)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1e-9])
def test_what_is_not_finite_or_negative_is_refused(value: float) -> None:
    with pytest.raises(InvalidValueError, match=rf"^rate: got {value!r}, allowed: finite numbers from 0\.$"):
        check_finite("rate", value)
    with pytest.raises(InvalidValueError, match=r"allowed: numbers above 0, below 1\.$"):
        check_finite("rate", value, above=True, below=1)


def test_the_ends_of_a_range_of_numbers() -> None:
    check_finite("rate", 0)
    check_finite("rate", 1e308)
    check_finite("rate", 0.999, above=True, below=1)
    for value in (0, 1):
        with pytest.raises(InvalidValueError, match="numbers above 0, below 1"):
            check_finite("rate", value, above=True, below=1)


@pytest.mark.parametrize(
    ("field", "value"),
    [("kv_cache_ratio", "0.5"), ("energy", "0.9"), ("kv_lora_rank", "64"), ("kv_lora_rank", True), ("energy", True)],
)
def test_a_budget_is_made_of_numbers(field: str, value: Any) -> None:
    with pytest.raises(InvalidValueError, match=rf"^{field}: got {value!r}, allowed: .*not a {type(value).__name__}"):
        RankBudget(**{field: value})


@pytest.mark.parametrize("value", ["16", 16.0, True])
def test_rotary_dims_are_an_integer(value: Any) -> None:
    with pytest.raises(InvalidValueError, match=r"^qk_rope_head_dim: got .*Give an integer"):
        check_rope_dim(value, 64, 32)


@pytest.mark.parametrize("field", ["bits", "group_size", "residual_length", "rope_bits"])
@pytest.mark.parametrize("value", ["8", 8.0, True, None])
def test_cache_settings_are_integers(field: str, value: Any) -> None:
    with pytest.raises(InvalidValueError, match=rf"^{field}: got .*Give an integer"):
        CacheSettings(**{field: value})


def test_the_backend_of_a_cache_is_a_name() -> None:
    with pytest.raises(InvalidValueError, match=r"^backend: got 4, allowed: the name of a library"):
        CacheSettings(backend=4)  # type: ignore[arg-type]
