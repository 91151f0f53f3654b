"""The tables of rotary embeddings that layers share."""

from __future__ import annotations

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from optimum_mla.ops.rotary import is_transposed
from optimum_mla.stack import first_positions_table, rotary_table


def embedding() -> LlamaRotaryEmbedding:
    """A rotary embedding of heads of 16 dims."""
    return LlamaRotaryEmbedding(LlamaConfig(hidden_size=64, num_attention_heads=4))


def test_a_table_is_computed_once_and_grows_in_powers_of_two() -> None:
    rotary, like = embedding(), torch.zeros(1)
    first = first_positions_table(rotary, like, 5, {})
    assert first[0].shape == (1, 8, 16)
    assert is_transposed(first[0])
    for found, wanted in zip(first, rotary_table(rotary, like, torch.arange(8)[None], {}), strict=True):
        assert torch.equal(found, wanted)
    assert first_positions_table(rotary, like, 8, {})[0] is first[0]
    longer = first_positions_table(rotary, like, 9, {})
    assert longer[0].shape == (1, 16, 16)
    assert first_positions_table(rotary, like, 3, {})[0] is longer[0]
    assert first_positions_table(rotary, like.double(), 3, {})[0].dtype is torch.float64


def test_other_frequencies_make_another_table() -> None:
    rotary, like = embedding(), torch.zeros(1)
    before = first_positions_table(rotary, like, 8, {})
    rotary.inv_freq.mul_(2)
    changed = first_positions_table(rotary, like, 8, {})
    assert torch.equal(changed[0][:, :4], before[0][:, :8:2])
    rotary.inv_freq = rotary.inv_freq / 2
    assert torch.equal(first_positions_table(rotary, like, 8, {})[0], before[0])


def test_a_table_made_in_inference_mode_serves_training_too() -> None:
    rotary = embedding()
    with torch.inference_mode():
        first_positions_table(rotary, torch.zeros(1), 4, {})
    cos, _ = first_positions_table(rotary, torch.zeros(1), 4, {})
    states = torch.ones(1, 4, 16, requires_grad=True)
    (states * cos[:, :4]).sum().backward()
    assert torch.equal(states.grad, cos[:, :4])
