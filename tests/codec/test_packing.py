"""Codes of every width go into bytes without gaps and come back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_mla.codec import (
    GRANULE,
    WIDTHS,
    ChannelBits,
    check_channel_bits,
    code_bounds,
    code_bytes,
    constants,
    pack,
    unpack,
)
from optimum_mla.core.errors import InvalidValueError
from optimum_mla.core.segments import segments, total_bits, total_channels

CHANNELS = st.lists(st.integers(0, 4), min_size=len(WIDTHS), max_size=len(WIDTHS)).map(
    lambda counts: tuple((bits, GRANULE * count) for bits, count in zip(WIDTHS, counts, strict=True) if count)
)


@given(CHANNELS.filter(bool), st.integers(0, 3), st.integers(1, 5), st.sampled_from([torch.float32, torch.bfloat16]))
def test_packing_is_undone_by_unpacking(channels: ChannelBits, batch: int, tokens: int, dtype: torch.dtype) -> None:
    low, high = code_bounds(channels, torch.zeros(()))
    spread = torch.rand(batch, tokens, len(low))
    codes = (low + spread * (high - low)).round().to(dtype)
    packed = pack(codes, channels)
    assert packed.shape == (batch, code_bytes(channels), tokens)
    assert 8 * code_bytes(channels) == total_bits(channels) == sum(bits * count for bits, count in channels)
    assert torch.equal(unpack(packed, channels, torch.full_like(codes, torch.nan)), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_of_a_width(bits: int) -> None:
    every = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).float()
    codes = every.repeat(GRANULE, 1).T[:, :GRANULE]  # a token for each code
    channels = ((bits, GRANULE),)
    packed = pack(codes, channels)
    assert len({tuple(token.tolist()) for token in packed.T}) == len(every)
    assert torch.equal(unpack(packed, channels, torch.empty_like(codes)), codes)


def test_what_is_no_code_is_clamped_and_rounded() -> None:
    channels = ((3, 8),)
    latents = torch.tensor([[-100.0, -4.4, -0.6, 0.4, 2.6, 3.4, 3.6, 100.0]])
    codes = unpack(pack(latents, channels), channels, torch.empty_like(latents))
    assert codes.tolist() == [[-4, -4, -1, 0, 3, 3, 3, 3]]


@given(CHANNELS)
def test_segments_are_those_of_the_channels(channels: ChannelBits) -> None:
    widths = [bits for bits, count in channels for _ in range(count)]
    assert segments(widths) == channels == check_channel_bits([list(pair) for pair in channels])
    assert total_channels(channels) == len(widths)


@pytest.mark.parametrize("wrong", [((7, 8),), ((4, 12),), ((4, 0),), ((3, 8), (4, 8)), ((4, 8), (4, 8)), 5, ((4,),)])
def test_other_bits_are_refused(wrong: object) -> None:
    with pytest.raises(InvalidValueError, match="channel_bits: got"):
        check_channel_bits(wrong)


def test_constants_are_kept_in_a_bounded_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "MOST_KEPT", 8)
    monkeypatch.setattr(constants, "_KEPT", {})
    cpu = torch.device("cpu")
    for _ in range(2):
        for number in range(20):
            made = constants.constant((number, 1), torch.uint8, cpu)
            assert made.tolist() == [number, 1]
            assert constants.constant((number, 1), torch.uint8, cpu) is made
            assert len(constants._KEPT) <= 8
