"""Latents become their own codes, apart from exempt tokens, and gradients pass through the rounding."""

from __future__ import annotations

import torch

from optimum_mla.codec import coded, is_coded

CHANNELS = ((3, 8), (1, 8))
LOW, HIGH = [-4] * 8 + [-1] * 8, [3] * 8 + [0] * 8


def test_latents_are_rounded_within_their_range() -> None:
    latents = 6 * torch.randn(2, 5, 16)
    codes = coded(latents, CHANNELS)
    assert torch.equal(codes, latents.clamp(torch.tensor(LOW), torch.tensor(HIGH)).round())
    assert is_coded(codes, CHANNELS).all()
    assert not is_coded(latents, CHANNELS).any()
    assert torch.equal(coded(codes, CHANNELS), codes)


def test_exempt_tokens_stay_as_they_are() -> None:
    latents = torch.randn(1, 4, 16)
    exempt = torch.tensor([[True, False, False, True]])
    codes = coded(latents, CHANNELS, exempt)
    assert torch.equal(codes[exempt], latents[exempt])
    assert is_coded(codes, CHANNELS).tolist() == [[False, True, True, False]]


def test_a_token_that_would_be_clipped_too_much_is_exempt() -> None:
    latents = torch.zeros(3, 16)
    latents[1, 0] = 3 + 4.1  # 4.1 squared over 16 channels is a little more than 1
    latents[2, 0] = 3 + 3.9
    codes = coded(latents, CHANNELS, None, limit=1.0)
    assert is_coded(codes, CHANNELS).tolist() == [True, False, True]
    assert codes[2, 0] == 3
    assert codes[1, 0] == latents[1, 0]


def test_gradients_pass_the_rounding_but_not_the_clipping() -> None:
    latents = torch.tensor([[0.3, 100.0] + [0.2] * 14], requires_grad=True)
    (coded(latents, CHANNELS) * torch.arange(16)).sum().backward()
    expected = torch.arange(16.0)
    expected[1] = 0  # clipped
    expected[8:] = 0  # one bit: 0.2 is above 0, the largest code
    assert torch.equal(latents.grad, expected[None])
