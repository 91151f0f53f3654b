"""Estimates of a conversion: they grow with the work, and say how good earlier ones were."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from optimum_mla import GQA2MLA
from optimum_mla.models.family_table import family_of
from optimum_mla.models.layers import model_geometry
from optimum_mla.pipeline.estimate import (
    EVALUATED,
    FIRST_PASS,
    LIBRARIES_BYTES,
    PLAIN_SECONDS,
    SOLUTIONS,
    WALKED,
    Probe,
    Work,
    conversion_memory,
    conversion_seconds,
    probe,
    work_of,
)
from optimum_mla.pipeline.history import SHOWN, Outcome, accuracy, history_file, outcomes, remember
from tests.cases import FAMILIES, SIZES, source_model, token_ids


@pytest.mark.parametrize("family", FAMILIES)
def test_the_probe_measures_a_layer_of_every_family(family: str) -> None:
    config = source_model(family).config
    found = probe(config, torch.device("cpu"), 32)
    longer = probe(config, torch.device("cpu"), 256)
    assert 0 < longer.token_seconds < 2 * found.token_seconds  # a call costs about the same for few tokens as for many
    assert found.solution_seconds > 0


def test_the_work_follows_the_options() -> None:
    ids = token_ids(32, 24)
    by_error = work_of(GQA2MLA(kv_cache_ratio=0.5, calibration=ids), 3)
    assert by_error == Work(3, 32 * 24, 16 * 24, True, compared_tokens=16 * 24)
    uniform = work_of(GQA2MLA(kv_cache_ratio=0.5, calibration=ids, rank_allocation="uniform"), 3, token_ids(2, 10))
    assert uniform == Work(3, 32 * 24, 0, True, 20)
    assert work_of(GQA2MLA(kv_cache_ratio=0.5), 2) == Work(2)


def test_the_time_adds_up_the_work() -> None:
    speed = Probe(token_seconds=0.001, solution_seconds=0.5)
    plain = conversion_seconds(speed, Work(4))
    assert plain == 4 * PLAIN_SECONDS
    walked = conversion_seconds(speed, Work(4, 1000, 100, True)) - plain
    assert walked == pytest.approx(4 * (WALKED * 1 + FIRST_PASS * 0.1 + 2 * SOLUTIONS * 0.5))
    assert conversion_seconds(speed, Work(4, compared_tokens=1000)) - plain == pytest.approx(4 * 2)
    assert conversion_seconds(speed, Work(4, evaluated_tokens=1000)) - plain == pytest.approx(4 * EVALUATED)


def test_the_memory_counts_the_logits_of_the_evaluation() -> None:
    model = source_model("llama")
    geometry = model_geometry(family_of(model.config).spec, model.config)
    without = conversion_memory(model.config, geometry, 1000, 0)
    states = conversion_memory(model.config, geometry, 1000, 10**6)
    logits = conversion_memory(model.config, geometry, 1000, 0, 10**6)
    assert LIBRARIES_BYTES < without < min(states, logits)
    assert states - without == 4 * 10**6 * SIZES["hidden_size"] * 4
    assert logits > 3 * 10**6 * SIZES["vocab_size"] * 4
    streams = conversion_memory(model.config, geometry, 1000, 0, compared_tokens=2048)
    assert streams - without == 3 * 2048 * SIZES["hidden_size"] * 4


def test_the_memory_of_an_offloaded_model_does_not_grow_with_its_depth() -> None:
    found = {}
    for layers in (4, 8):
        config = source_model("llama", num_hidden_layers=layers).config
        geometry = model_geometry(family_of(config).spec, config)
        # As many bytes as there are parameters, so that the rounding of the share does not matter.
        weights = sum(p.numel() for p in source_model("llama", num_hidden_layers=layers).parameters())
        found[layers] = [conversion_memory(config, geometry, weights, 0, offloaded=off) for off in (True, False)]
    assert found[4][0] == pytest.approx(found[8][0], abs=2000)  # norms are not counted as parts of a layer
    assert found[8][1] - found[4][1] > 20_000


OUTCOME = Outcome("a", "gqa2mla", 10.0, 12.0, 1000, 900)


def test_what_conversions_took_is_kept_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    assert outcomes() == []
    assert accuracy(outcomes()) is None
    remember(OUTCOME)
    assert accuracy(outcomes()) == (
        "The last conversion here took 1.2 times the predicted time and 0.9 times the predicted memory."
    )
    with history_file().open("ab") as file:
        file.write(b'{"model": "of another version"}\nno JSON\n' + b"\0" * 20 + b"\xff\n")
    remember(replace(OUTCOME, seconds=5.0))
    assert outcomes() == [OUTCOME, replace(OUTCOME, seconds=5.0)]
    assert accuracy(outcomes()) == (
        "The last 2 conversions here took 0.5 to 1.2 times the predicted time and 0.9 times the predicted memory."
    )
    for _ in range(SHOWN):
        remember(OUTCOME)
    assert len(outcomes()) == SHOWN


def test_a_home_that_cannot_be_written_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "file"))
    remember(OUTCOME)
    assert outcomes() == []
