"""What fits a budget, by hand; sizes as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimum_mla.core.errors import InvalidValueError
from optimum_mla.measure.sizes import budget_rows, parse_bytes
from optimum_mla.report.rows import MemoryRow


def row(context: int, live: int, batch: int = 1, role: str = "model") -> MemoryRow:
    return MemoryRow(role, "default", context, batch, live_cache_bytes=live, weight_bytes=1_000)


def test_slope_and_offset_are_those_between_the_contexts() -> None:
    (found,) = budget_rows([row(100, 700), row(300, 1_100), row(200, 900)], 100_000)
    assert (found.cache_bytes_per_token, found.cache_fixed_bytes) == (2.0, 500.0)
    assert found.longest_context_tokens == (100_000 - 1_000 - 500) // 2
    assert found.largest_batch == (100_000 - 1_000) // (2 * 8192 + 500)


def test_one_context_has_no_offset_and_batches_count_by_row() -> None:
    (found,) = budget_rows([row(100, 2_000, batch=4)], 10_000)
    assert (found.cache_bytes_per_token, found.cache_fixed_bytes) == (5.0, 0.0)
    assert found.longest_context_tokens == 1_800


def test_a_budget_below_the_weights_fits_nothing() -> None:
    (found,) = budget_rows([row(100, 500)], 900)
    assert (found.longest_context_tokens, found.largest_batch) == (0, 0)


def test_rows_without_numbers_are_left_out() -> None:
    missing = MemoryRow("baseline", "default", 100, 1, problem="out of memory")
    assert [one.role for one in budget_rows([missing, row(100, 500)], 9_000)] == ["model"]


@given(
    number=st.integers(1, 10**6),
    unit=st.sampled_from(
        [("", 1), ("k", 10**3), ("M", 10**6), ("GB", 10**9), ("KiB", 2**10), ("gib", 2**30), ("TB", 10**12)]
    ),
    space=st.sampled_from(["", " "]),
)
def test_sizes_are_read_as_written(number: int, unit: tuple[str, int], space: str) -> None:
    assert parse_bytes(f"{space}{number}{unit[0]}{space}") == number * unit[1]


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "24 bananas", "inf", "nan", "1e999", "1.5.2GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InvalidValueError, match="memory_budget: got"):
        parse_bytes(text)
