"""Rotation with gathered frequencies."""

from __future__ import annotations

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from optimum_mla.ops.rotary import gather_rotation, rotate


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
