"""Vectors of cached tokens map, whatever the dtype, the number of tokens and the order in memory."""

from __future__ import annotations

import pytest
import torch

from optimum_mla.ops import blocks
from optimum_mla.ops.blocks import Latents, ShiftedLatents

EPS = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 4e-3, torch.float16: 1e-3}


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("tokens", [8, 512, 600])
@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("multiplies", [False, True])
def test_every_way_to_map_the_vectors_gives_the_same(
    dtype: torch.dtype, tokens: int, by_channel: bool, multiplies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "multiplies", lambda dtype: multiplies)
    generator = torch.Generator().manual_seed(5)
    vectors, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((2, tokens, 40), (24, 40), (24,))
    )
    stored = vectors.mT.contiguous().mT if by_channel else vectors
    latents = Latents(stored)
    assert latents.by_channel == by_channel
    for of in (None, bias):
        expected = torch.nn.functional.linear(vectors.double(), weight.double(), None if of is None else of.double())
        found = latents.project(weight, of)
        assert found.shape == expected.shape
        assert (found.double() - expected).abs().max() <= EPS[dtype] * expected.abs().max()
        # The numbers of one row of the weight lie side by side for all tokens.
        assert found.stride(1) == 1


def test_a_map_of_a_growing_block_has_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "multiplies", lambda dtype: True)
    weight = torch.ones(3, 4, dtype=torch.bfloat16, requires_grad=True)
    vectors = torch.arange(300 * 4).reshape(1, 300, 4).remainder(7).to(torch.bfloat16)
    Latents(vectors).project(weight, None).sum().backward()
    assert torch.allclose(weight.grad.float(), vectors.float().sum((0, 1)).expand(3, -1), rtol=1e-2)


def test_shifts_are_a_part_of_what_is_mapped() -> None:
    numbers, shifts = torch.randn(1, 5, 8), torch.randn(1, 5, 2)
    latents = ShiftedLatents(torch.cat([numbers, shifts], dim=-1), shifts=2, group=4, width=7)
    weight, bias = torch.randn(3, 7), torch.randn(3)
    assert torch.allclose(
        latents.project(weight, bias), torch.nn.functional.linear(latents.dense(), weight, bias), atol=1e-5
    )
