"""A numeric option that holds something else is one line that says what it takes."""

from __future__ import annotations

from typing import Any

import pytest

from optimum_mla.cache import CacheSettings
from optimum_mla.core.errors import InvalidValueError
from optimum_mla.core.number_checks import check_integer, check_number
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
