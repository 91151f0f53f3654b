"""The codec of a layer: bytes, round trips, and codecs that are fitted to vectors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from optimum_mla.codec import gains, naive
from optimum_mla.codec.fit_vectors import Axes, VectorFit
from optimum_mla.codec.vectors import VectorCodec
from optimum_mla.core.errors import InvalidValueError

WIDTH, TOKENS = 48, 600


def vectors(seed: int = 0) -> Tensor:
    """Vectors about a mean, whose channels and whose tokens are of different sizes."""
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(7)))[0]
    sizes = torch.exp(0.6 * torch.randn(TOKENS, 1, generator=draw))
    falling = torch.logspace(0.5, -1.5, WIDTH)
    return sizes * torch.randn(TOKENS, WIDTH, generator=draw) * falling @ mixed + 3


def axes(of: Tensor) -> Axes:
    """The principal axes of vectors."""
    found = torch.linalg.eigh(of.double().T.cov()).eigenvectors.flip(-1)
    return Axes(found.T, found, torch.ones(WIDTH, dtype=torch.float64))


def lost(codec: VectorCodec, of: Tensor) -> float:
    """The share of the variance that a codec does not bring back."""
    error = codec.decode(codec.encode(of)) - of
    return float(error.square().sum() / (of - of.mean(0)).square().sum())


def test_codes_come_back_as_the_specification_says() -> None:
    codec = VectorFit(axes(vectors()), vectors(), 20).codec(20)
    some = vectors(1)[:6]
    latents = (some - codec.centre) @ codec.latent_down.T
    codes = naive.encode(latents, codec.layout, codec.weight)
    wanted = naive.decode(codes, codec.layout) @ codec.latent_up.T + codec.centre
    torch.testing.assert_close(codec.decode(codec.encode(some)), wanted)


@pytest.mark.parametrize("groups", [0, 8])
@pytest.mark.parametrize("size", [8, 12, 20, 40])
def test_a_codec_has_the_bytes_that_were_asked_for(size: int, groups: int) -> None:
    codec = VectorFit(axes(vectors()), vectors(), size, groups).codec(size)
    assert size - 1 <= codec.layout.bytes_per_token <= size
    packed = codec.encode(vectors().unflatten(0, (2, 3, -1)))
    assert packed.shape == (2, 3, codec.layout.bytes_per_token, TOKENS // 6)
    assert packed.dtype == torch.uint8


@pytest.mark.parametrize(("groups", "least"), [(0, 0.999), (8, 0.5)])
def test_the_predicted_error_is_about_that_of_the_codes(groups: int, least: float) -> None:
    """Without gains to rounding. With gains the encoder chooses better ones than the prediction knows."""
    fit = VectorFit(axes(vectors()), vectors(), 20, groups)
    for size in (12, 20, 30):
        codec = fit.codec(size)
        change = codec.decode(codec.encode(vectors())) - vectors()
        assert least < float(change.square().sum(1).mean()) / fit.error(size) < 1.001


def test_more_bytes_lose_less_and_gains_are_worth_their_bits() -> None:
    other = vectors(1)
    with_gains, without = (
        [lost(VectorFit(axes(vectors()), vectors(), size, groups).codec(size), other) for size in (8, 12, 20, 40)]
        for groups in (8, 0)
    )
    assert with_gains == sorted(with_gains, reverse=True)
    assert with_gains[-1] < 0.01
    assert with_gains[2] < 0.8 * without[2]


def test_the_same_vectors_give_the_same_codec() -> None:
    first, second = (VectorFit(axes(vectors()), vectors(), 20).codec(20) for _ in range(2))
    assert first.layout == second.layout
    assert all(torch.equal(tensor, second.tensors[name]) for name, tensor in first.tensors.items())


@pytest.mark.parametrize("value", [0.0, 2.5])
def test_vectors_that_are_all_the_same_come_back(value: float) -> None:
    constant = torch.full((20, WIDTH), value)
    codec = VectorFit(axes(vectors()), constant, 8).codec(8)
    torch.testing.assert_close(codec.decode(codec.encode(constant)), constant)
    assert codec.decode(codec.encode(constant + 1)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_vectors_of_every_dtype_have_the_codes_of_the_same_numbers(dtype: torch.dtype) -> None:
    codec = VectorFit(axes(vectors()), vectors(), 20).codec(20)
    some = vectors(1).to(dtype)
    assert torch.equal(codec.encode(some), codec.encode(some.float()))


def test_tensors_that_do_not_fit_the_layout_are_refused() -> None:
    codec = VectorFit(axes(vectors()), vectors(), 20).codec(20)
    with pytest.raises(InvalidValueError, match=r"latent_up: got .* as the layout says"):
        replace(codec, latent_up=codec.latent_up.T)


def test_encoding_leaves_gains_within_their_bits() -> None:
    codec = VectorFit(axes(vectors()), vectors(), 20).codec(20)
    latents = 1e4 * torch.randn(3, codec.layout.num_channels)
    codes = gains.encode(latents, codec.layout, codec.weight)
    assert codes[:, codec.layout.num_channels :].max() == 3
    assert codes.isfinite().all()


def test_codes_are_the_same_under_autocast_and_have_shapes_on_the_meta_device() -> None:
    codec, some = VectorFit(axes(vectors()), vectors(), 20).codec(20), vectors(1)
    packed = codec.encode(some)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(codec.encode(some), packed, rtol=0, atol=0)
        read = codec.decode(packed)
    torch.testing.assert_close(read, codec.decode(packed), rtol=0, atol=0)
    assert codec.to("meta").encode(some.to("meta")).shape == packed.shape
