"""The rank that holds a share of the energy."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_mla.ops.rank_allocation import rank_for_energy


@pytest.mark.parametrize(
    ("energy", "rank"), [(0.01, 1), (0.63, 1), (0.65, 2), (0.8, 2), (0.95, 2), (0.97, 3), (1.0, 3)]
)
def test_by_hand(energy: float, rank: int) -> None:
    # squares 64, 32, 4: shares 0.64, 0.96, 1
    assert rank_for_energy(torch.tensor([8.0, 32**0.5, 2.0]), energy) == rank


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=20), st.floats(0.01, 1))
def test_is_the_smallest_that_suffices(values: list[float], energy: float) -> None:
    spectrum = torch.tensor(values, dtype=torch.float64).sort(descending=True).values
    rank = rank_for_energy(spectrum, energy)
    total = spectrum.square().sum()
    assert spectrum[:rank].square().sum() >= energy * total * (1 - 1e-12)
    assert spectrum[: rank - 1].square().sum() < energy * total
