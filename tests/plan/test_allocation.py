"""Shares of one budget against brute force and by hand."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimum_mla.plan.allocation import SMALLEST_SHARE, allocate, fit_power_law, rank_range, scaled

Curves = dict[int, dict[int, float]]


def falling(ranks: list[int], start: float, speed: float) -> dict[int, float]:
    """An error that falls by the same factor with each number."""
    return {rank: start * math.exp(-speed * rank) for rank in ranks}


def rank_grid(rank: int, largest: int) -> list[int]:
    """Some ranks around a rank: the ends of the range of its curve, and itself."""
    return sorted({*rank_range(rank, largest), min(rank, largest)})


def floor_of(total: int, layers: int) -> int:
    """What every layer gets at least."""
    return max(1, math.floor(SMALLEST_SHARE * total / layers))


STARTS, SPEEDS = st.floats(1e-3, 1e3), st.floats(1e-3, 0.5)


@given(
    errors=st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=5),
    rank=st.integers(1, 60),
    largest=st.integers(1, 80),
)
def test_ranks_add_up_and_lie_within_the_curves(errors: list[list[float]], rank: int, largest: int) -> None:
    rank = min(rank, largest)
    grid = rank_grid(rank, largest)
    # In any order, and some are zero: what is measured is noisy.
    curves = {3 * layer: dict(zip(grid, row, strict=False)) for layer, row in enumerate(errors)}
    total = rank * len(curves)
    ranks = allocate(curves, total)
    assert ranks.keys() == curves.keys()
    assert sum(ranks.values()) == total
    assert all(min(curves[layer]) <= ranks[layer] <= max(curves[layer]) for layer in curves)
    assert min(ranks.values()) >= floor_of(total, len(curves))


@given(start=STARTS, slow=SPEEDS, ratio=st.floats(1.5, 10), rank=st.integers(8, 60))
def test_layers_whose_error_would_stay_larger_get_more(start: float, slow: float, ratio: float, rank: int) -> None:
    grid = rank_grid(rank, 2 * rank)
    # The same fall per number, relatively: the larger error falls faster.
    ranks = allocate({0: falling(grid, start, slow), 1: falling(grid, ratio * start, slow)}, 2 * rank)
    assert ranks[1] >= ranks[0]
    gap = math.log(ratio) / slow
    assert ranks[1] - ranks[0] == pytest.approx(min(gap, 2 * (rank - grid[0]), 2 * (grid[-1] - rank)), abs=2)


def test_a_flat_layer_gives_to_a_steep_one() -> None:
    grid = rank_grid(20, 100)
    flat, steep = dict.fromkeys(grid, 1.0), falling(grid, 1.0, 0.1)
    assert allocate({0: flat, 1: steep}, 40) == {0: 10, 1: 30}
    assert allocate({0: steep, 1: flat}, 40) == {0: 30, 1: 10}


@given(layers=st.integers(1, 6), start=STARTS, speed=SPEEDS, rank=st.integers(1, 60))
def test_equal_curves_get_equal_ranks(layers: int, start: float, speed: float, rank: int) -> None:
    curve = falling(rank_grid(rank, 100), start, speed)
    ranks = allocate({layer: dict(curve) for layer in range(layers)}, layers * rank)
    assert set(ranks.values()) == {rank}


def best_by_brute_force(curves: Curves, total: int) -> float:
    """The least sum of errors over all ways to share the total."""
    floor = floor_of(total, len(curves))
    choices = [[rank for rank in curve if rank >= floor] for curve in curves.values()]
    return min(
        sum(curve[rank] for curve, rank in zip(curves.values(), ranks, strict=True))
        for ranks in itertools.product(*choices)
        if sum(ranks) == total
    )


@given(
    shapes=st.lists(st.tuples(STARTS, SPEEDS), min_size=2, max_size=4), largest=st.integers(2, 8), share=st.floats(0, 1)
)
def test_convex_curves_are_shared_as_brute_force_does(
    shapes: list[tuple[float, float]], largest: int, share: float
) -> None:
    curves = {layer: falling(list(range(1, largest + 1)), *shape) for layer, shape in enumerate(shapes)}
    total = len(curves) + int(share * len(curves) * (largest - 1))
    ranks = allocate(curves, total)
    assert sum(ranks.values()) == total
    assert min(ranks.values()) >= floor_of(total, len(curves))
    error = sum(curves[layer][rank] for layer, rank in ranks.items())
    assert error == pytest.approx(best_by_brute_force(curves, total), rel=1e-9)


def test_the_floor_holds_where_another_layer_would_take_all() -> None:
    curves = {0: falling(list(range(1, 41)), 1e-6, 0.01), 1: falling(list(range(1, 41)), 1e6, 0.01)}
    assert allocate(curves, 40) == {0: 5, 1: 35}


def test_a_layer_smaller_than_the_floor_gets_all_that_it_can_hold() -> None:
    curves = {0: {1: 1.0, 2: 0.5}, 1: falling(list(range(1, 101)), 1.0, 0.01)}
    assert allocate(curves, 60) == {0: 2, 1: 58}


def test_more_than_all_layers_can_hold_fills_them() -> None:
    assert allocate({0: {1: 1.0, 3: 0.5}, 1: {1: 1.0, 4: 0.5}}, 100) == {0: 3, 1: 4}


def test_between_measured_ranks_the_logarithm_is_linear() -> None:
    sparse = {0: falling([1, 9], 1.0, 0.3), 1: falling([1, 3, 9], 5.0, 0.2)}
    dense = {0: falling(list(range(1, 10)), 1.0, 0.3), 1: falling(list(range(1, 10)), 5.0, 0.2)}
    for total in range(2, 19):
        assert allocate(sparse, total) == allocate(dense, total)


def test_errors_of_zero_are_allowed() -> None:
    assert allocate({0: {1: 1.0, 5: 0.0}, 1: {1: 0.0, 5: 0.0}}, 6) == {0: 5, 1: 1}


@given(rank=st.integers(1, 4096), largest=st.integers(1, 4096))
def test_the_range_lies_within_its_bounds_and_around_the_rank(rank: int, largest: int) -> None:
    low, high = rank_range(rank, largest)
    assert 1 <= low <= min(rank, largest) <= high <= largest
    assert high == largest or high >= 1.4 * rank


@given(start=STARTS, speed=SPEEDS, factor=st.floats(1e-3, 1e3), power=st.floats(0.3, 2), high=st.integers(2, 40))
def test_a_prediction_is_bent_to_what_was_measured(
    start: float, speed: float, factor: float, power: float, high: int
) -> None:
    predicted = falling(list(range(1, high + 1)), start, speed)
    truth = {rank: factor * error**power for rank, error in predicted.items()}
    curve = fit_power_law(predicted, {rank: truth[rank] for rank in (1, high)})
    assert curve.keys() == truth.keys()
    assert all(curve[rank] == pytest.approx(truth[rank], rel=1e-6) for rank in truth)


@pytest.mark.parametrize("measured", [{1: 1.0, 3: 1.0}, {1: 0.5, 3: 1.0}, {1: 1.0, 3: 0.0}], ids=str)
def test_what_does_not_fall_is_taken_as_it_is(measured: dict[int, float]) -> None:
    assert fit_power_law({1: 4.0, 2: 2.0, 3: 1.0}, measured) == measured


def test_a_curve_is_scaled_at_a_rank_between_its_own() -> None:
    assert scaled({4: 9.0, 8: 1.0}, 6, 6.0) == pytest.approx({4: 18.0, 8: 2.0})
    assert scaled({4: 9.0, 8: 3.0}, 20, 1.0) == pytest.approx({4: 3.0, 8: 1.0})
    assert scaled({4: 0.0, 8: 0.0}, 4, 0.5) == {4: 0.5, 8: 0.5}
