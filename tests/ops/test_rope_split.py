"""Selections of rotary pairs and the partition of a head's dims."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_mla.ops.rope_split import select_pairs, split_by_pairs, split_last_columns


@pytest.mark.parametrize(
    ("selection", "pairs"),
    [("high", [0, 1, 2]), ("low", [5, 6, 7]), ("uniform", [0, 2, 5]), ("contribution", [1, 4, 7])],
)
def test_selections_by_hand(selection: str, pairs: list[int]) -> None:
    scores = torch.tensor([[0.0, 9.0, 1.0, 2.0, 8.0, 3.0, 4.0, 7.0]])
    assert select_pairs(selection, 16, 6, scores).tolist() == [pairs]


def test_contribution_is_chosen_for_each_head() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]])
    assert select_pairs("contribution", 8, 4, scores, heads=2).tolist() == [[2, 3], [0, 1]]


@given(data=st.data(), half=st.integers(2, 32), heads=st.integers(1, 3))
def test_a_split_is_a_partition_into_whole_pairs(data: st.DataObject, half: int, heads: int) -> None:
    kept = data.draw(st.integers(1, half - 1))
    scores = torch.rand(heads, half)
    pairs = select_pairs("contribution", 2 * half, 2 * kept, scores, heads)
    split = split_by_pairs(pairs, 2 * half)
    for head in range(heads):
        dims = torch.cat([split.nope[head], split.rope[head]])
        assert dims.sort().values.tolist() == list(range(2 * half))
        first, second = split.rope[head].chunk(2)
        assert torch.equal(second - first, torch.full((kept,), half))
        assert torch.equal(first, split.pairs[head])


def test_last_columns_turn_like_a_head_of_their_own_size() -> None:
    head_dim, rope_dim, theta = 64, 32, 10000.0
    split = split_last_columns(head_dim, rope_dim)
    assert split.rope.tolist() == [list(range(32, 64))]
    assert split.nope.tolist() == [list(range(32))]
    source = theta ** (-2 * torch.arange(head_dim // 2) / head_dim)
    own = theta ** (-2 * torch.arange(rope_dim // 2) / rope_dim)
    assert torch.allclose(source[split.pairs[0]], own)
