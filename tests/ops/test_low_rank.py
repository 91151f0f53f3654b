"""Low-rank factors against torch's own singular value decomposition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_mla.ops.low_rank import low_rank_factors, rank_for_energy, singular_values

SIDES = st.integers(1, 24)


@given(rows=SIDES, columns=SIDES, share=st.floats(0, 1), seed=st.integers(0, 1000))
def test_error_is_the_smallest_possible(rows: int, columns: int, share: float, seed: int) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rank = 1 + int(share * (min(rows, columns) - 1))
    down, up = low_rank_factors(matrix, rank)
    assert (down.shape, up.shape) == ((rank, columns), (rows, rank))
    spectrum = torch.linalg.svdvals(matrix)
    best = spectrum[rank:].square().sum().sqrt()  # Eckart and Young
    assert torch.allclose((matrix - up @ down).norm(), best, atol=1e-9)
    assert torch.allclose(singular_values(matrix), spectrum, atol=1e-6)
    assert torch.allclose(down.norm(dim=1), up.norm(dim=0), atol=1e-9)  # both sides carry the same scale


def test_full_rank_is_exact_however_small_the_last_singular_values() -> None:
    left, right = (torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64))[0] for _ in range(2))
    matrix = left @ torch.diag(10.0 ** -torch.arange(20, dtype=torch.float64)) @ right
    down, up = low_rank_factors(matrix, 20)
    assert (matrix - up @ down).abs().max() < 1e-14


def test_float32_weights_are_factorized_in_float64() -> None:
    matrix = torch.randn(12, 30)
    down, up = low_rank_factors(matrix, 12)
    assert down.dtype == up.dtype == torch.float64
    assert (matrix.double() - up @ down).abs().max() < 1e-12


def test_a_rank_above_the_matrix_own_adds_nothing_and_stays_finite() -> None:
    matrix = torch.outer(torch.arange(1.0, 7.0), torch.arange(1.0, 5.0))
    for rank in (1, 4):
        down, up = low_rank_factors(matrix, rank)
        assert torch.allclose(up @ down, matrix.double(), atol=1e-10)
    down, up = low_rank_factors(torch.zeros(6, 4), 2)
    assert torch.equal(up @ down, torch.zeros(6, 4, dtype=torch.float64))


def test_signs_do_not_depend_on_the_eigensolver() -> None:
    matrix = torch.randn(10, 16, dtype=torch.float64)
    for candidate in (matrix, matrix.T.contiguous()):
        down, up = low_rank_factors(candidate, 5)
        basis = up.T if candidate.shape[0] <= candidate.shape[1] else down
        peaks = basis.gather(1, basis.abs().argmax(1, keepdim=True))
        assert (peaks > 0).all()


@pytest.mark.parametrize(
    ("energy", "rank"), [(0.01, 1), (0.63, 1), (0.65, 2), (0.8, 2), (0.95, 2), (0.97, 3), (1.0, 3)]
)
def test_the_rank_for_an_energy_by_hand(energy: float, rank: int) -> None:
    # squares 64, 32, 4: shares 0.64, 0.96, 1
    assert rank_for_energy(torch.tensor([8.0, 32**0.5, 2.0]), energy) == rank


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=20), st.floats(0.01, 1))
def test_the_rank_for_an_energy_is_the_smallest_that_suffices(values: list[float], energy: float) -> None:
    spectrum = torch.tensor(values, dtype=torch.float64).sort(descending=True).values
    rank = rank_for_energy(spectrum, energy)
    total = spectrum.square().sum()
    assert spectrum[:rank].square().sum() >= energy * total * (1 - 1e-12)
    assert spectrum[: rank - 1].square().sum() < energy * total
