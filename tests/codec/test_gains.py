"""Codes with gains: the fast encoder and decoder beside the specification, and what is stored."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_mla.codec import gains, naive
from optimum_mla.codec.layout import GAIN_BITS, Layout, groups_of
from optimum_mla.codec.packing import pack, unpack
from optimum_mla.core.errors import InvalidValueError

LAYOUTS = st.lists(st.tuples(st.sampled_from((8, 6, 5, 4, 3, 2, 1)), st.integers(1, 3)), min_size=1, max_size=4).map(
    lambda pairs: tuple(sorted({bits: 8 * count for bits, count in pairs}.items(), reverse=True))
)


@given(LAYOUTS, st.sampled_from((0, 8)), st.integers(0, 99))
def test_the_fast_codes_are_those_of_the_specification(
    channels: tuple[tuple[int, int], ...], groups: int, seed: int
) -> None:
    layout, draw = Layout(channels, groups), torch.Generator().manual_seed(seed)
    sizes = torch.tensor([0.01, 0.6, 1.0, 3.0, 40.0])[:, None]  # Some tokens are beyond the reach of the gains.
    latents = sizes * torch.randn(5, layout.num_channels, generator=draw)
    weight = torch.rand(layout.num_channels, generator=draw) + 0.1
    found, wanted = gains.encode(latents, layout, weight), naive.encode(latents, layout, weight)
    for codes in (found, wanted):
        torch.testing.assert_close(gains.decode(codes.clone(), layout), naive.decode(codes, layout))
    error, least = (
        ((gains.decode(codes.clone(), layout) - latents).square() * weight).sum(1) for codes in (found, wanted)
    )
    # Sums in another order may choose another one of two gains that are equally good.
    torch.testing.assert_close(error, least, rtol=1e-5, atol=1e-6)


@given(LAYOUTS, st.sampled_from((0, 8)))
def test_codes_and_gains_are_packed_without_gaps(channels: tuple[tuple[int, int], ...], groups: int) -> None:
    layout = Layout(channels, groups)
    latents = 3 * torch.randn(2, 7, layout.num_channels)
    codes = gains.encode(latents, layout, torch.ones(layout.num_channels))
    packed = pack(codes, layout.stored)
    assert packed.shape == (2, layout.bytes_per_token, 7)
    assert 8 * layout.bytes_per_token == sum(bits * count for bits, count in channels) + GAIN_BITS * groups
    assert torch.equal(unpack(packed, layout.stored, torch.empty_like(codes)), codes)


def test_gains_take_up_the_size_of_a_token() -> None:
    layout = Layout(((2, 32),))
    latents = torch.randn(200, 32)
    weight = torch.ones(32)

    def left(latents: torch.Tensor, layout: Layout) -> float:
        change = gains.decode(gains.encode(latents, layout, weight), layout) - latents
        return float(change.square().sum() / latents.square().sum())

    for size in (0.5, 2.0):
        assert left(size * latents, layout) < 0.16  # The best code of two bits leaves 0.12 of normal values.
        assert left(size * latents, layout) < 0.8 * left(size * latents, Layout(((2, 32),), 0))


def test_groups_are_neighbours_of_one_size_up_to_one() -> None:
    groups = groups_of(44, 8)
    assert sorted(groups) == list(groups)
    assert {groups.count(group) for group in range(8)} == {5, 6}
    assert groups_of(8, 8) == tuple(range(8))


@pytest.mark.parametrize(("channels", "groups"), [(((4, 8),), 16), (((4, 8),), 3), (((4, 8),), -8), (((4, 8),), 8.0)])
def test_a_number_of_groups_that_is_none_is_refused(channels: tuple[tuple[int, int], ...], groups: int) -> None:
    with pytest.raises(InvalidValueError, match=r"gain_groups: got .*, allowed: 0, or a multiple of 8 up to 8"):
        Layout(channels, groups)


def test_a_layout_comes_back_from_its_dictionary() -> None:
    layout = Layout(((4, 16), (2, 8)))
    assert Layout.from_dict({"channels": [[4, 16], [2, 8]], "gain_groups": 8}) == layout
    assert hash(layout) == hash(Layout(((4, 16), (2, 8))))
