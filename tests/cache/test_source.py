"""Transformers' quantized caches for unconverted models, by the names of this package."""

from __future__ import annotations

import pytest
import torch
from transformers import Cache, LlamaConfig, LlamaForCausalLM, MistralConfig

from optimum_mla.cache.source import SOURCE_NAMES, default_baselines, source_cache, source_cache_name
from optimum_mla.core.errors import InvalidValueError, UnsupportedModelError
from optimum_mla.measure.memory import live_cache_bytes, measured_cache_bytes
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
    [
        ("default", 1),
        ("hqq-int8", 8.5 / 16),
        ("hqq-int4", 4.5 / 16),
        ("hqq-int2", 2.5 / 16),
        ("quanto-int4", 4.5 / 16),
        ("kivi-int4", 4.5 / 16),
        ("kivi-int2", 2.5 / 16),
    ],
)
def test_the_bytes_are_those_of_codes_scales_and_zeros(name: str, share: float) -> None:
    model = LlamaForCausalLM(CONFIG).to(torch.bfloat16).eval()
    ids = torch.arange(64)[None]
    live = measured_cache_bytes(model, ids, source_cache(CONFIG, name))
    assert live / (64 * 2 * 2 * 64 * 2) == pytest.approx(share)


@pytest.mark.parametrize("name", ["hqq-int8", "hqq-int4", "hqq-int2", "quanto-int4", "kivi-int4", "kivi-int2"])
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


@pytest.mark.parametrize("layout", ["hqq", "quanto", "kivi"])
def test_the_first_tokens_are_kept_and_counted(layout: str) -> None:
    states = torch.randn(2, 1, 70, 64, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    bytes_of = {}
    for name in (f"{layout}-int4", f"{layout}-int4-first4"):
        cache = source_cache(CONFIG, name)
        cache.update(states, states, 0)
        keys, values = cache.update(states[:, :, :1], states[:, :, :1], 0)
        bytes_of[name] = live_cache_bytes(Cache(layers=[cache.layers[0]]))
        kept = 4 if name.endswith("first4") else 0
        for coded in (keys, values):
            assert coded.shape == (2, 1, 71, 64)
            assert torch.equal(coded[:, :, :kept], states[:, :, :kept])
            assert 0 < (coded[:, :, kept:70] - states[:, :, kept:]).norm() < 0.2 * states.norm()
    # Rows of 128 bytes for 2 x 2 x 4 tokens instead of groups of 32 + 4; kivi's groups of tokens are filled up.
    less = {"hqq": 36, "quanto": 36, "kivi": 18}[layout]
    assert bytes_of[f"{layout}-int4-first4"] - bytes_of[f"{layout}-int4"] == pytest.approx(
        2 * 2 * 4 * (128 - less), abs=300
    )


def test_kivi_groups_keys_over_tokens() -> None:
    """Channels of very different size cost nothing where each has its own scales, and much in groups of channels."""
    states = torch.randn(1, 1, 128, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, 3, 64)
    errors = {}
    for layout in ("hqq", "kivi"):
        cache = source_cache(CONFIG, f"{layout}-int4")
        cache.update(states, states, 0)
        keys, values = cache.update(states[:, :, :1], states[:, :, :1], 0)
        pairs = zip((keys, values), (states, states), strict=True)
        errors[layout] = [((got[:, :, :128] - want).norm(dim=2) / want.norm(dim=2)).max().item() for got, want in pairs]
    assert errors["kivi"][0] < 0.15 < 0.5 < errors["hqq"][0]
    assert errors["kivi"][1] > 0.5


def test_names_are_those_of_the_message() -> None:
    assert [source_cache_name(name) for name in ("source", "source-hqq-int4")] == ["default", "hqq-int4"]
    assert source_cache_name("source-kivi-int2-first4") == "kivi-int2-first4"
    for name in SOURCE_NAMES.split(", "):
        source_cache_name(name)
    for name in (
        "hqq-int4",
        "source-hqq-int3",
        "source-hqq",
        "source-",
        "sauce",
        "source-abc-int4",
        "source-kivi-int3",
        "source-hqq-int4-first0",
    ):
        with pytest.raises(InvalidValueError, match=r"baselines: got .*allowed: source, source-hqq-int8"):
            source_cache_name(name)
    assert default_baselines()[0] == "source"


def test_a_model_whose_layers_have_windows_has_no_such_cache() -> None:
    config = MistralConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=2, sliding_window=8)
    with pytest.raises(UnsupportedModelError, match="no hqq-int4 cache for this model"):
        source_cache(config, "hqq-int4")
