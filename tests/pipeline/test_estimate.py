"""Estimates of a conversion: they grow with the work, and their words promise no more than they can."""

from __future__ import annotations

import pytest
import torch

from optimum_mla import GQA2MLA
from optimum_mla.models.layers import model_geometry
from optimum_mla.models.registry import family_of
from optimum_mla.pipeline.estimate import (
    LIBRARIES_BYTES,
    TOKEN_WORK,
    block_parameters,
    conversion_memory,
    conversion_seconds,
    duration,
    products_per_second,
)
from tests.cases import SIZES, source_model, token_ids


def test_blocks_are_all_but_the_embeddings() -> None:
    model = source_model("llama")
    outside = 2 * SIZES["vocab_size"] * SIZES["hidden_size"]
    assert block_parameters(model) == sum(p.numel() for p in model.parameters()) - outside


def test_the_time_grows_with_the_text_and_with_the_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    from optimum_mla.pipeline import estimate

    model = source_model("llama")
    assert products_per_second(torch.device("cpu")) > 1e6
    monkeypatch.setattr(estimate, "products_per_second", lambda device: 1e6)
    plain = conversion_seconds(model, GQA2MLA(kv_cache_ratio=0.5))
    short, long = (conversion_seconds(model, GQA2MLA(calibration=token_ids(rows, 24))) for rows in (4, 8))
    assert plain < short < long
    assert long - short == pytest.approx(TOKEN_WORK * 3 * 4 * 24 * block_parameters(model) / 1e6)
    everything = sum(p.numel() for p in model.parameters())
    measured = conversion_seconds(model, GQA2MLA(kv_cache_ratio=0.5), token_ids(2, 10))
    assert measured - plain == pytest.approx(2 * 20 * everything / 1e6)


def test_the_memory_counts_the_logits_of_the_evaluation() -> None:
    model = source_model("llama")
    geometry = model_geometry(family_of(model.config).spec, model.config)
    without = conversion_memory(model.config, geometry, 1000, 0)
    states = conversion_memory(model.config, geometry, 1000, 10**6)
    logits = conversion_memory(model.config, geometry, 1000, 0, 10**6)
    assert LIBRARIES_BYTES < without < min(states, logits)
    assert states - without == 4 * 10**6 * SIZES["hidden_size"] * 4
    assert logits > 3 * 10**6 * SIZES["vocab_size"] * 4


def test_durations_are_rounded() -> None:
    shown = [duration(seconds) for seconds in (3, 14, 89, 100, 5000, 36_000)]
    assert shown == [
        *("a few seconds", "about 10 seconds", "about 90 seconds", "about 2 minutes", "about 83 minutes"),
        "about 10.0 hours",
    ]
