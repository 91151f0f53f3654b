"""Positions of cached tokens, recovered from those of the new ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_mla.ops.positions import cached_positions

CPU = torch.device("cpu")


@given(
    rows=st.lists(st.lists(st.booleans(), min_size=12, max_size=12), min_size=1, max_size=3),
    length=st.integers(1, 12),
    by_mask=st.booleans(),
    static_room=st.integers(0, 4),
)
def test_attended_slots_get_the_positions_that_they_were_rotated_with(
    rows: list[list[bool]], length: int, by_mask: bool, static_room: int
) -> None:
    mask = torch.tensor(rows)
    mask[:, -1] = True  # the newest token is real
    slots = torch.arange(12).expand_as(mask)
    positions = (mask.cumsum(-1) - 1).masked_fill(~mask, 1) if by_mask else slots
    room = torch.zeros(mask.shape[0], static_room, dtype=torch.bool)
    dense = torch.cat([mask, room], dim=1)[:, None, None].expand(-1, 1, length, -1)
    seen = torch.tensor(12 - length) if static_room else 12 - length
    found = cached_positions(positions[:, -length:], dense, seen, length, 12 + static_room, CPU)
    assert torch.equal(found[:, :12][mask], positions[mask])
    additive = torch.zeros(dense.shape).masked_fill(~dense, torch.finfo(torch.float32).min)
    assert torch.equal(cached_positions(positions[:, -length:], additive, seen, length, 12 + static_room, CPU), found)


@pytest.mark.parametrize(("seen", "expected"), [(5, [0, 1, 2, 3, 4, 5]), (9, [4, 5, 6, 7, 8, 9])])
def test_without_a_mask_slots_count_back_from_the_newest(seen: int, expected: list[int]) -> None:
    """Also where a sliding window has dropped the oldest tokens."""
    position_ids = torch.tensor([[seen]])
    assert cached_positions(position_ids, None, seen, 1, 6, CPU).tolist() == [expected]
    assert cached_positions(None, None, seen, 1, 6, CPU).tolist() == [expected]
    assert cached_positions(position_ids + 3, None, seen, 1, 6, CPU).tolist() == [[p + 3 for p in expected]]
