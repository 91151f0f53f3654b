"""Perplexity and live bytes, against counts by hand."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import DynamicCache

from optimum_mla import MHA2MLA
from optimum_mla.measure.memory import bytes_per_token, live_cache_bytes, peak_memory_bytes
from optimum_mla.measure.quality import perplexity
from optimum_mla.report.render import Table
from tests.cases import source_model, token_ids


def test_perplexity_is_the_exponential_of_the_mean_loss() -> None:
    model, windows = source_model("llama").train(), token_ids(5, 12)
    total = 0.0
    with torch.no_grad():
        for row in windows:
            log_probabilities = model.eval()(row[None]).logits[0].double().log_softmax(-1)
            total -= sum(log_probabilities[t, row[t + 1]].item() for t in range(11))
    model.train()
    assert perplexity(model, windows) == pytest.approx(math.exp(total / 55), rel=1e-5)
    assert model.training


def test_perplexity_of_a_uniform_model_is_its_vocabulary() -> None:
    model = source_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert perplexity(model, token_ids(3, 9)) == pytest.approx(97, rel=1e-5)


def test_a_diverged_model_has_infinite_perplexity() -> None:
    model = source_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    assert perplexity(model, token_ids(3, 9)) == math.inf


def test_live_bytes_count_whole_storages_once() -> None:
    source = source_model("llama")
    cache = DynamicCache(config=source.config)
    with torch.no_grad():
        source(token_ids(2, 10), past_key_values=cache)
    assert live_cache_bytes(cache) == 2 * 10 * 3 * 2 * 2 * 16 * 4  # rows, tokens, layers, k and v, heads, dims, bytes
    cache.crop(-4)  # a view: the storage behind it stays whole
    assert live_cache_bytes(cache) == 2 * 10 * 3 * 2 * 2 * 16 * 4
    assert bytes_per_token(source, token_ids(1, 8)).live == 3 * 2 * 2 * 16 * 4


def test_no_full_size_key_or_value_is_alive_after_a_step() -> None:
    """What the published converters get wrong: the cache object must hold nothing of the expanded size."""
    converted = MHA2MLA(kv_cache_ratio=0.25)(source_model("llama"))
    cache = DynamicCache(config=converted.config)
    with torch.no_grad():
        for token in token_ids(1, 6)[0]:
            converted(token[None, None], past_key_values=cache)
    assert live_cache_bytes(cache) == 6 * 3 * 16 * 4
    for layer in cache.layers:
        assert layer.keys.shape[1:3] == layer.values.shape[1:3] == (1, 6)


def test_peak_memory_is_at_least_what_is_resident() -> None:
    assert peak_memory_bytes() > 50e6


def test_tables_are_aligned() -> None:
    assert str(Table(("a", "bb"), [("ccc", "d")])).splitlines() == ["a    bb", "-------", "ccc   d"]
