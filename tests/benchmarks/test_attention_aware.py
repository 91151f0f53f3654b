"""The baseline with bits by what attention sees."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.attention_aware import attention_aware_codec
from optimum_mla.stack import cache_argument


@torch.no_grad()
def test_keys_and_values_have_channels_of_their_own_and_more_bytes_are_closer() -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2)).eval()
    for parameter in model.parameters():
        parameter.mul_(4)  # so that attention and predictions are far from uniform
    ids = torch.randint(97, (6, 192), generator=torch.Generator().manual_seed(0))
    source = model(ids).logits[:, -8:].log_softmax(-1)
    moved = []
    for budget in (0.0625, 0.125, 0.5):
        codec = attention_aware_codec(model, ids, budget)
        assert codec.bytes_per_token <= 2 * budget * 2 * codec.layers[0].width
        for layer in codec.layers.values():
            assert layer.layout.gain_groups == 0
            assert not (layer.latent_down[:, :32].any(1) & layer.latent_down[:, 32:].any(1)).any()
        given = cache_argument(model, codec.make_cache(model))
        model(ids[:, :-8], **given)
        found = model(ids[:, -8:], **given).logits.log_softmax(-1)
        moved.append(float((source.exp() * (source - found)).sum(-1).mean()))
    assert moved[0] > moved[1] > moved[2] > 0
