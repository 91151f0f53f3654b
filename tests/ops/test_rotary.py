"""Rotation with gathered frequencies."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from optimum_mla.ops.rotary import Rotation, gather_rotation, is_transposed, rotate


def table(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [1, length, 16] of a Llama head of 16 dims."""
    rotary = LlamaRotaryEmbedding(LlamaConfig(hidden_size=64, num_attention_heads=4))
    return rotary(torch.zeros(1, dtype=torch.float64), torch.arange(length)[None])


def test_all_pairs_in_order_is_the_source_rotation() -> None:
    cos, sin = table(7)
    x = torch.randn(2, 4, 7, 16, dtype=torch.float64)
    ours = rotate(x, gather_rotation(cos, sin, torch.arange(8)[None]))
    assert torch.allclose(ours, apply_rotary_pos_emb(x, x, cos, sin)[0], atol=1e-12)


def test_each_rotary_head_turns_its_own_pairs() -> None:
    cos, sin = table(5)
    pairs = torch.tensor([[0, 3], [6, 2]])
    x = torch.randn(1, 4, 5, 16, dtype=torch.float64)
    whole = apply_rotary_pos_emb(x, x, cos, sin)[0]
    for head in range(4):
        dims = torch.cat([pairs[head // 2], pairs[head // 2] + 8])  # two heads to a rotary head
        ours = rotate(x[..., :4] * 0 + x[:, head : head + 1, :, dims], gather_rotation(cos, sin, pairs))
        assert torch.allclose(ours[:, head], whole[:, head][..., dims], atol=1e-12)


def test_the_order_in_memory_changes_no_number() -> None:
    cos, sin = table(6)
    pairs = torch.tensor([[0, 3], [6, 2]])
    x = torch.randn(2, 4, 6, 4, dtype=torch.float64)
    plain = rotate(x, gather_rotation(cos, sin, pairs))
    by_dim = gather_rotation(*(part.mT.contiguous().mT for part in (cos, sin)), pairs)
    assert is_transposed(by_dim.cos)
    turned = rotate(x.mT.contiguous().mT, by_dim)
    assert is_transposed(turned)
    assert torch.equal(turned, plain)
    assert torch.equal(rotate(x, by_dim), plain)


@pytest.mark.parametrize("by_dim", [False, True])
def test_without_gradients_the_same_is_computed_in_fewer_passes(by_dim: bool) -> None:
    cos, sin = table(6)
    rotation = gather_rotation(cos, sin, torch.tensor([[0, 3], [6, 2]]))
    x = torch.randn(2, 4, 6, 4, dtype=torch.float64)
    x = x.mT.contiguous().mT if by_dim else x
    with torch.no_grad():
        ours = rotate(x, rotation)
    expected = rotate(x.requires_grad_(), rotation)
    assert is_transposed(ours) == is_transposed(expected) == by_dim
    assert torch.allclose(ours, expected, rtol=0, atol=1e-14)
    with torch.no_grad():
        half = Rotation(*(part.bfloat16() for part in rotation))
        with torch.enable_grad():
            graded = rotate(x.detach().bfloat16().requires_grad_(), half)
        assert torch.equal(rotate(x.bfloat16(), half), graded)
        with torch.enable_grad():  # Keys are in float32 where the table is in the model's 16 bits.
            graded = rotate(x.detach().float().requires_grad_(), half)
        mixed = rotate(x.float(), half)
    assert mixed.dtype is torch.float32
    assert torch.allclose(mixed, graded, rtol=0, atol=1e-6)
    expected.square().sum().backward()  # a rotation keeps lengths
    assert torch.allclose(x.grad, 2 * x, atol=1e-12)
