"""Steps have the least squared error, and bits go where they are worth most."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_mla.codec import GRANULE, WIDTHS
from optimum_mla.codec.fit import GAUSSIAN_STEPS, MARGIN, CodeTable, allocate_bits

GAUSSIAN_ERRORS = {1: 0.3634, 2: 0.1188, 3: 0.03744, 4: 0.01154, 5: 0.00349, 6: 0.00104, 8: 0.0000912}
"""Least mean squared errors of uniform codes on a normal distribution (Max 1960, table II)."""


def test_steps_are_widened_for_texts_with_larger_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes lose a little on the text that they are fitted to, and less on one with a third more variance."""
    samples = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0))
    wide = CodeTable.fit(samples, torch.ones(2, dtype=torch.float64))
    monkeypatch.setattr("optimum_mla.codec.fit.MARGIN", 1.0)
    narrow = CodeTable.fit(samples, torch.ones(2, dtype=torch.float64))
    bits = list(WIDTHS)
    torch.testing.assert_close(wide.steps[:, bits], MARGIN * narrow.steps[:, bits])
    assert (wide.errors[:, bits] >= narrow.errors[:, bits]).all()
    assert (wide.errors[:, bits] <= 1.01 * MARGIN**2 * narrow.errors[:, bits]).all()
    other = 1.35**0.5 * samples
    for width in (2, 3, 4):
        half, left = 2 ** (width - 1), []
        for table in (narrow, wide):
            steps = table.steps[:, width]
            codes = (other / steps - 0.5).round().clamp(-half, half - 1)
            left.append(((codes + 0.5) * steps - other).square().mean())
        assert left[1] < {2: 0.98, 3: 0.96, 4: 0.96}[width] * left[0]


def test_codes_of_a_normal_distribution_are_those_of_the_textbook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optimum_mla.codec.fit.MARGIN", 1.0)
    samples = 2 * torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0))
    table = CodeTable.fit(samples, torch.tensor([1.0, 5.0], dtype=torch.float64))
    for bits in WIDTHS:
        assert table.errors[0, bits] == pytest.approx(4 * GAUSSIAN_ERRORS[bits], rel=0.1)
        assert table.errors[1, bits] == pytest.approx(5 * 4 * GAUSSIAN_ERRORS[bits], rel=0.1)
        assert table.steps[0, bits] == pytest.approx(2 * GAUSSIAN_STEPS[bits], rel=0.15)
    assert table.errors[0, 0] == pytest.approx(4, rel=0.05)
    assert table.errors[0, 7].isinf()


def test_the_errors_are_those_of_the_codes() -> None:
    samples = torch.randn(500, 16, generator=torch.Generator().manual_seed(0)).pow(3)
    costs = torch.rand(16, dtype=torch.float64)
    table = CodeTable.fit(samples, costs)
    for bits in WIDTHS:
        widths = torch.full((16,), bits)
        steps = table.steps.gather(1, widths[:, None])[:, 0]
        codes = (samples / steps - 0.5).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        error = (((codes + 0.5) * steps - samples).square().mean(0) * costs).sum()
        assert float(table.errors[:, bits].sum()) == pytest.approx(float(error), rel=1e-4)


@given(st.integers(0, 60), st.integers(0, 1000))
def test_bits_are_as_good_as_any_others(units: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(3, generator=generator, dtype=torch.float64).repeat_interleave(GRANULE)
    # As of real codes: falling and convex in the bits, with no code of 7 bits.
    errors = scale[:, None] * 4.0 ** -torch.arange(9, dtype=torch.float64)
    errors[:, 7] = torch.inf
    budget = units * 8 // 2
    widths = allocate_bits(errors, budget)
    assert int(widths.sum()) <= budget
    assert all(len(set(group.tolist())) == 1 for group in widths.split(GRANULE))
    found = float(errors.gather(1, widths[:, None]).sum())
    best = min(
        float(errors.gather(1, torch.tensor(choice).repeat_interleave(GRANULE)[:, None]).sum())
        for choice in itertools.product((0, *WIDTHS), repeat=3)
        if GRANULE * sum(choice) <= budget
    )
    # Whole groups cannot spend every bit, so the greedy choice may be one step behind the best.
    spent = float(errors.gather(1, allocate_bits(errors, max(0, budget - 2 * GRANULE))[:, None]).sum())
    assert best <= found <= spent + 1e-12


def test_channels_after_the_last_whole_group_get_no_bits() -> None:
    errors = torch.ones(13, 9, dtype=torch.float64).cumsum(1).flip(1)
    assert allocate_bits(errors, 10_000).tolist() == [8] * 8 + [0] * 5
