"""Factors weighted on both sides against explicit roots of the block-diagonal moments."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from optimum_mla.core.errors import CalibrationDataError
from optimum_mla.ops.low_rank import low_rank_factors
from optimum_mla.ops.weighted import WeightedFactorization, WeightedFactors, WeightedRows, damped_cholesky

SHAPES = {"wide": (6, 40), "tall": (30, 20)}
"""Rows of each of the three blocks together, and inputs."""


def random_moment(*shape: int, seed: int) -> Tensor:
    """Positive definite [..., n, n] of uneven scales; well conditioned, so that the damping is hardly seen."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(*shape, shape[-1], generator=generator, dtype=torch.float64)
    scales = 10 ** torch.linspace(-0.25, 0.25, shape[-1], dtype=torch.float64)
    return (root * scales) @ (root * scales).mT / shape[-1] + torch.eye(shape[-1], dtype=torch.float64)


def random_rows(groups: int, size: int, inputs: int, seed: int) -> list[WeightedRows]:
    """Three blocks of groups·size rows: weighed as one matrix, row by row, and group by group."""
    generator = torch.Generator().manual_seed(seed)
    count = groups * size
    blocks = [(1, count), (count, 1), (groups, size)]
    return [
        WeightedRows(
            torch.randn(count, inputs, generator=generator, dtype=torch.float64) * 3**index,
            random_moment(number, width, seed=seed + 1 + index),
        )
        for index, (number, width) in enumerate(blocks)
    ]


def true_error(rows: list[WeightedRows], inputs: Tensor, approximation: Tensor) -> float:
    """‖Lᵀ (W - approximation) R‖² with L and R the undamped Cholesky factors of all moments."""
    left = torch.linalg.cholesky(torch.block_diag(*(block for row in rows for block in row.moment)))
    change = torch.cat([row.weight for row in rows]) - approximation
    return float((left.T @ change @ torch.linalg.cholesky(inputs)).square().sum())


def product(factors: WeightedFactors) -> Tensor:
    """The approximation of all rows, one below the other."""
    return torch.cat([up @ factors.down for up in factors.ups])


CASES = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 40), st.integers(0, 1000))


@given(case=CASES, share=st.floats(0, 1))
def test_error_is_that_of_the_factors_and_no_worse_than_a_plain_decomposition(
    case: tuple[int, int, int, int], share: float
) -> None:
    groups, size, width, seed = case
    rows, inputs = random_rows(groups, size, width, seed), random_moment(width, seed=seed + 9)
    factorization = WeightedFactorization(rows, inputs)
    count = 3 * groups * size
    rank = 1 + int(share * (min(count, width) - 1))
    factors = factorization.factors(rank)
    assert factors.down.shape == (rank, width)
    assert [up.shape for up in factors.ups] == [(groups * size, rank)] * 3
    error = true_error(rows, inputs, product(factors))
    everything = true_error(rows, inputs, torch.zeros(count, width, dtype=torch.float64))
    assert factorization.error(rank) == pytest.approx(error, rel=1e-4, abs=1e-12 * everything)
    assert factorization.error(0) == pytest.approx(everything, rel=1e-4)
    plain = low_rank_factors(torch.cat([row.weight for row in rows]), rank)
    # The damping is part of what is minimized, so the optimum may be missed by as much.
    assert error <= true_error(rows, inputs, plain.up @ plain.down) * (1 + 1e-4) + 1e-12 * everything


def test_error_is_the_best_possible_one_and_below_a_plain_decomposition() -> None:
    rows, inputs = random_rows(3, 4, 48, seed=0), random_moment(48, seed=10)
    factorization = WeightedFactorization(rows, inputs)
    left = torch.linalg.cholesky(torch.block_diag(*(block for row in rows for block in row.moment)))
    weight = torch.cat([row.weight for row in rows])
    spectrum = torch.linalg.svdvals(left.T @ weight @ torch.linalg.cholesky(inputs))
    for rank in (1, 7, 20, 30):
        assert factorization.error(rank) == pytest.approx(float(spectrum[rank:].square().sum()), rel=1e-4)
    plain = low_rank_factors(weight, 7)
    assert factorization.error(7) < 0.9 * true_error(rows, inputs, plain.up @ plain.down)


@given(case=CASES)
def test_full_rank_reproduces_the_weights(case: tuple[int, int, int, int]) -> None:
    groups, size, width, seed = case
    rows = random_rows(groups, size, width, seed)
    factors = WeightedFactorization(rows, random_moment(width, seed=seed + 9)).factors(min(3 * groups * size, width))
    for row, up in zip(rows, factors.ups, strict=True):
        assert torch.allclose(up @ factors.down, row.weight, rtol=0, atol=1e-8)


def test_both_sides_carry_the_same_scale() -> None:
    rows = random_rows(2, 4, 30, seed=3)
    factors = WeightedFactorization(rows, random_moment(30, seed=4)).factors(9)
    assert torch.allclose(factors.down.norm(dim=1), torch.cat(factors.ups).norm(dim=0), rtol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_dead_channels_give_finite_factors_that_are_exact_elsewhere(shape: str) -> None:
    count, width = SHAPES[shape]
    root = torch.randn(width, width // 2, dtype=torch.float64)
    root[3] = 0  # one input is always zero, and the others span half the space only
    inputs = root @ root.T
    weight = torch.randn(count, width, dtype=torch.float64)
    reader = torch.randn(count, max(1, count // 3), dtype=torch.float64)
    rank = min(width // 2, count)
    factors = WeightedFactorization([WeightedRows(weight, (reader @ reader.T)[None])], inputs).factors(rank)
    assert product(factors).isfinite().all()
    left = reader.T @ (weight - product(factors)) @ root
    assert left.norm() < 1e-2 * (reader.T @ weight @ root).norm()


@pytest.mark.parametrize("blocks", [1, 2, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_block_that_nothing_reads_gives_finite_factors_and_costs_nothing(shape: str, blocks: int) -> None:
    count, width = SHAPES[shape]
    rows = [
        WeightedRows(
            torch.randn(8, width, dtype=torch.float64), torch.zeros(blocks, 8 // blocks, 8 // blocks).double()
        ),
        WeightedRows(torch.randn(count, width, dtype=torch.float64), random_moment(1, count, seed=1)),
    ]
    inputs = random_moment(width, seed=2)
    factorization, alone = WeightedFactorization(rows, inputs), WeightedFactorization(rows[1:], inputs)
    for rank in range(1, min(8 + count, width) + 1):
        factors = factorization.factors(rank)
        assert product(factors).isfinite().all()
        error = true_error(rows[1:], inputs, factors.ups[1] @ factors.down)
        assert error == pytest.approx(alone.error(rank), rel=1e-4, abs=1e-6 * alone.error(0))


@pytest.mark.parametrize("nothing", ["readers", "inputs", "weight", "one group of readers"])
def test_zeros_everywhere_give_finite_factors(nothing: str) -> None:
    weight, readers, inputs = torch.randn(6, 10).double(), random_moment(3, 2, seed=1), random_moment(10, seed=2)
    if nothing == "one group of readers":
        readers[1] = 0
    else:
        {"readers": readers, "inputs": inputs, "weight": weight}[nothing].zero_()
    factorization = WeightedFactorization([WeightedRows(weight, readers)], inputs)
    for rank in (1, 4, 6):
        factors = factorization.factors(rank)
        assert all(tensor.isfinite().all() for tensor in (factors.down, *factors.ups))


@pytest.mark.parametrize("where", ["readers", "inputs"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_moment_that_is_not_finite_is_an_error(where: str, value: float) -> None:
    readers, inputs = random_moment(3, 2, seed=1), random_moment(10, seed=2)
    {"readers": readers[1], "inputs": inputs}[where][0, 1] = value
    with pytest.raises(CalibrationDataError, match="not finite"):
        WeightedFactorization([WeightedRows(torch.randn(6, 10).double(), readers)], inputs)


def test_the_damped_root_of_a_good_moment_is_its_own() -> None:
    moment = random_moment(4, 5, seed=1)
    root = damped_cholesky(moment, "test")
    assert torch.allclose(root @ root.mT, moment, rtol=1e-4, atol=1e-4)
    assert torch.equal(root, root.tril())


def test_moments_that_rounding_left_below_zero_still_have_a_root() -> None:
    reader = torch.randn(12, 3, dtype=torch.float64)
    moment = reader @ reader.T
    moment -= 1e-4 * moment.norm() * torch.eye(12)
    assert torch.linalg.eigvalsh(moment)[0] < 0
    assert damped_cholesky(moment[None], "test").isfinite().all()


@pytest.mark.parametrize("groups", [1, 3])
def test_the_same_input_gives_the_same_factors(groups: int) -> None:
    rows, inputs = random_rows(groups, 4, 20, seed=5), random_moment(20, seed=6)
    first, second = (WeightedFactorization(rows, inputs).factors(7) for _ in range(2))
    assert torch.equal(first.down, second.down)
    assert all(torch.equal(one, other) for one, other in zip(first.ups, second.ups, strict=True))


def test_signs_do_not_depend_on_the_eigensolver() -> None:
    rows, inputs = random_rows(2, 3, 30, seed=7), random_moment(30, seed=8)
    factors = WeightedFactorization(rows, inputs).factors(5)
    weighted = torch.cat(
        [
            (torch.linalg.cholesky(torch.block_diag(*row.moment)).T @ up)
            for row, up in zip(rows, factors.ups, strict=True)
        ]
    )
    peaks = weighted.gather(0, weighted.abs().argmax(0, keepdim=True))
    assert (peaks > 0).all()
