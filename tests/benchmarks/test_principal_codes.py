"""The baseline with bits by principal component."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.principal_codes import AllLayers, PrincipalCodes, unrotated
from optimum_mla.stack import cache_argument


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2)).eval()


def test_unrotated_keys_are_the_projections_output(model: LlamaForCausalLM) -> None:
    keys = torch.randn(1, 2, 9, 16, generator=torch.Generator().manual_seed(0))
    there = unrotated(model, keys, 5, back=True)
    assert (there - keys).norm() > 0.5 * keys.norm()
    torch.testing.assert_close(unrotated(model, there, 5), keys)
    torch.testing.assert_close(unrotated(model, there[:, :, 4:], 9), keys[:, :, 4:])


@torch.no_grad()
def test_more_bits_are_closer_and_the_first_tokens_are_exact(model: LlamaForCausalLM) -> None:
    ids = torch.randint(97, (6, 64), generator=torch.Generator().manual_seed(0))
    codes = PrincipalCodes(model, ids)
    whole = model(ids).logits
    errors = []
    for share in (1 / 16, 1 / 8, 1 / 4, 1 / 2):
        cache = codes.cache(share, sinks=4)
        logits = model(ids, **cache_argument(model, cache), use_cache=True).logits
        errors.append(((logits - whole).norm() / whole.norm()).item())
        torch.testing.assert_close(logits[:, :4], whole[:, :4])
        bits = [int(widths.sum()) for layer in cache.layers for widths in layer.widths]
        assert sum(bits) <= share * 16 * 2 * 64
        assert sum(bits) > share * 16 * 2 * 64 - 2 * 2 * 64
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.03 < errors[0]


@torch.no_grad()
def test_steps_give_what_one_pass_gives(model: LlamaForCausalLM) -> None:
    ids = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(1))
    codes = PrincipalCodes(model, ids)
    cache = codes.cache(0.25, sinks=4)
    parts = [
        model(part, **cache_argument(model, cache), use_cache=True).logits
        for part in (ids[:, :2], ids[:, 2:9], ids[:, 9:])
    ]
    whole = model(ids, **cache_argument(model, codes.cache(0.25, sinks=4)), use_cache=True).logits
    torch.testing.assert_close(torch.cat(parts, 1), whole)


@torch.no_grad()
def test_axes_of_all_layers_code_the_prompt_after_it_was_read(model: LlamaForCausalLM) -> None:
    ids = torch.randint(97, (6, 64), generator=torch.Generator().manual_seed(0))
    codes = AllLayers(model, ids)
    assert len(codes.axes[0].axes) == 2 * 2 * 16
    prompt, after = ids[:, :48], ids[:, 48:]
    whole = model(ids).logits
    errors = []
    for share in (1 / 16, 1 / 8, 1 / 4, 1 / 2):
        cache = codes.cache(share, sinks=4, recent=8)
        torch.testing.assert_close(model(prompt, **cache_argument(model, cache)).logits, whole[:, :48])
        exact = cache.layers[1].keys.clone()
        errors.append(float((model(after, **cache_argument(model, cache)).logits - whole[:, 48:]).norm()))
        assert cache.coded == 48 - 4 - 8
        changed = (cache.layers[1].keys[:, :, :48] != exact).any(-1).any(1).any(0)
        assert changed.nonzero().flatten().tolist() == list(range(4, 40))
        assert sum(int(widths.sum()) for widths in cache.widths) <= share * 16 * 2 * 64
    assert errors == sorted(errors, reverse=True)
