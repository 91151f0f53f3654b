"""Transformers' quantized caches for unconverted models, by the names of this package."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig

from optimum_mla.cache.source import SOURCE_NAMES, default_baselines, source_cache, source_cache_name
from optimum_mla.core.errors import InvalidValueError, UnsupportedModelError
from optimum_mla.measure.memory import measured_cache_bytes
from optimum_mla.stack import cache_argument

CONFIG = LlamaConfig(
    vocab_size=97,
    hidden_size=128,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=64,
)


@pytest.mark.compat
@pytest.mark.parametrize(
    ("name", "share"),
    [("default", 1), ("hqq-int8", 8.5 / 16), ("hqq-int4", 4.5 / 16), ("hqq-int2", 2.5 / 16), ("quanto-int4", 4.5 / 16)],
)
def test_the_bytes_are_those_of_codes_scales_and_zeros(name: str, share: float) -> None:
    model = LlamaForCausalLM(CONFIG).to(torch.bfloat16).eval()
    ids = torch.arange(64)[None]
    live = measured_cache_bytes(model, ids, source_cache(CONFIG, name))
    assert live / (64 * 2 * 2 * 64 * 2) == pytest.approx(share)


@pytest.mark.parametrize("name", ["hqq-int8", "hqq-int4", "hqq-int2", "quanto-int4"])
@pytest.mark.parametrize("tokens", [1, 31, 63])
def test_any_number_of_tokens_is_decoded(name: str, tokens: int) -> None:
    """HQQ itself fails for numbers of groups that are odd, as here."""
    model = LlamaForCausalLM(CONFIG).eval()
    ids = torch.arange(tokens + 2)[None]
    cache = source_cache(CONFIG, name)
    with torch.no_grad():
        model(ids[:, :tokens], **cache_argument(model, cache), use_cache=True)
        out = [model(ids[:, [at]], **cache_argument(model, cache), use_cache=True).logits for at in (-2, -1)]
        whole = model(ids).logits[:, -2:]
    rounding = {"8": 0.01, "4": 0.2, "2": 0.7}[name[-1]]
    assert (torch.cat(out, 1) - whole).norm() <= rounding * whole.norm()


def test_names_are_those_of_the_message() -> None:
    assert [source_cache_name(name) for name in ("source", "source-hqq-int4")] == ["default", "hqq-int4"]
    for name in SOURCE_NAMES.split(", "):
        source_cache_name(name)
    for name in ("hqq-int4", "source-hqq-int3", "source-hqq", "source-", "sauce", "source-abc-int4"):
        with pytest.raises(InvalidValueError, match=r"baselines: got .*allowed: source, source-hqq-int8"):
            source_cache_name(name)
    assert default_baselines()[0] == "source"


def test_a_model_whose_layers_have_windows_has_no_such_cache() -> None:
    config = MistralConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=2, sliding_window=8)
    with pytest.raises(UnsupportedModelError, match="no hqq-int4 cache for this model"):
        source_cache(config, "hqq-int4")
