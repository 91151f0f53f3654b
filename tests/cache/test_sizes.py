"""Predicted cache bytes against live ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedConfig

from optimum_mla import GQA2MLA, MHA2MLA, XEcoMLA
from optimum_mla.cache.settings import named_cache
from optimum_mla.core.errors import InvalidValueError
from optimum_mla.measure.memory import live_cache_bytes
from optimum_mla.measure.sizes import predicted_cache_bytes
from tests.cases import FAMILIES, METHODS, source_model, token_ids

TOKENS = 100
EVERY_CACHE = ("default", "16bit", "hqq-int4", "hqq-int3", "quanto-int8", "quanto-int4")


def live(model: Any, cache: str, tokens: int, batch: int = 1, **settings: Any) -> int:
    held, ids = model.make_cache(**named_cache(cache), **settings), token_ids(batch, tokens)
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=held, use_cache=True)
        model(ids[:, -1:], past_key_values=held, use_cache=True)
    return live_cache_bytes(held)


@pytest.mark.compat
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "mistral with a window", "qwen3"])
@pytest.mark.parametrize("method", ["gqa2mla half", "mha2mla joint", "x-ecomla", "x-ecomla hybrid", "gqa2mla rebuilt"])
def test_unquantized_caches_take_what_is_predicted(method: str, family: str, dtype: torch.dtype) -> None:
    model = METHODS[method](token_ids(4, 24))(source_model(family, dtype))
    predicted = predicted_cache_bytes(model.config, "16bit", TOKENS, dtype.itemsize, steps=1)
    assert predicted is not None
    assert 2 * predicted[0] <= live(model, "16bit", TOKENS, batch=2) <= 2 * sum(predicted)


@pytest.mark.parametrize("cache", ["hqq-int8", "hqq-int4", "hqq-int3", "hqq-int2", "quanto-int8", "quanto-int4"])
@pytest.mark.parametrize("settings", [{"residual_length": 0}, {"residual_length": 24, "group_size": 8}])
@pytest.mark.parametrize("method", [XEcoMLA, MHA2MLA, GQA2MLA])
def test_quantized_caches_take_what_is_predicted(method: Any, settings: dict[str, int], cache: str) -> None:
    model = method(kv_cache_ratio=0.75)(source_model("llama", torch.bfloat16))
    for rope_bits in (16, 8):
        model.config.latent_cache = {**settings, "rope_bits": rope_bits}
        predicted = predicted_cache_bytes(model.config, cache, TOKENS, 2, steps=1)
        assert predicted is not None
        found = live(model, cache, TOKENS, **settings, rope_bits=rope_bits)
        assert predicted[0] <= found <= sum(predicted)
        if settings["residual_length"] == 0:
            assert found == predicted[0]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_predicted_with_every_kind_of_cache(method: str) -> None:
    """Three rows, a family each, windows and layers that stay as they were among them."""
    family = list(FAMILIES)[list(METHODS).index(method) % len(FAMILIES)]
    for name, dtype in ((family, torch.float32), ("mistral with a window", torch.bfloat16)):
        model = METHODS[method](token_ids(4, 24))(source_model(name, dtype))
        model.config.latent_cache = {"residual_length": 8, "group_size": 8, "rope_bits": 8}
        for cache in EVERY_CACHE:
            predicted = predicted_cache_bytes(model.config, cache, TOKENS, dtype.itemsize, steps=1)
            assert predicted is not None
            found = live(model, cache, TOKENS, batch=3)
            assert 0.98 * 3 * predicted[0] <= found <= 1.02 * 3 * predicted[0] + 3 * predicted[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_source_is_predicted(family: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = source_model(family, dtype)
        held = DynamicCache(config=model.config)
        ids = token_ids(3, TOKENS)
        with torch.no_grad():
            model(ids[:, :-1], past_key_values=held, use_cache=True)
            model(ids[:, -1:], past_key_values=held, use_cache=True)
        predicted = predicted_cache_bytes(model.config, "default", TOKENS, dtype.itemsize, steps=1)
        assert predicted == (live_cache_bytes(held) / 3, 0)


def test_kinds_that_are_not_known_are_not_predicted() -> None:
    assert predicted_cache_bytes(PreTrainedConfig(), "default", 10, 2) is None


def test_a_growing_cache_stays_within_the_spare_room() -> None:
    model = XEcoMLA(kv_cache_ratio=0.5)(source_model("llama"))
    held = model.make_cache()
    with torch.no_grad():
        for step in range(1, 41):
            model(token_ids(1, 1), past_key_values=held, use_cache=True)
            predicted = predicted_cache_bytes(model.config, "default", step, 4, steps=step - 1)
            assert predicted is not None
            assert predicted[0] <= live_cache_bytes(held) <= sum(predicted)


def test_the_sources_cache_is_that_of_its_heads() -> None:
    assert predicted_cache_bytes(source_model("llama").config, "default", 10, 2) == (10 * 3 * 2 * 2 * 16 * 2, 0)
    windowed = source_model("mistral with a window").config
    assert predicted_cache_bytes(windowed, "default", 100, 2) == (8 * 3 * 2 * 2 * 16 * 2, 0)


@pytest.mark.parametrize("name", ["", "int4", "hqq", "hqq-int", "hqq-intfour", "8bit"])
def test_names_that_mean_nothing_are_refused(name: str) -> None:
    with pytest.raises(InvalidValueError, match=r"cache: got .*default, 16bit"):
        named_cache(name)
