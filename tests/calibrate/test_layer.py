"""The error that a candidate leaves, and on how much it is measured."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from optimum_mla.calibrate.damage import DAMAGE_WINDOWS
from optimum_mla.calibrate.layer import LayerCalibration
from optimum_mla.calibrate.windows import DECIDING_WINDOWS, HELD_BACK, deciding, fitted
from optimum_mla.ops.rope_mix import identity_mix
from tests.calibrate.walked import (
    FAMILIES,
    GROUPS,
    HELD,
    LAYERS,
    PAIRS,
    Walked,
    disturbed,
    sources_of,
    states_after_attention,
    walk_through,
)
from tests.cases import source_model, token_ids


def test_many_tokens_go_through_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = source_model("qwen3", torch.float64)
    changed, sources = disturbed(model, 0), sources_of(model)

    def measured() -> list[Tensor]:
        walk = walk_through(model)
        walk.advance(changed.model.layers[0].self_attn)
        calibration = LayerCalibration(walk, sources[1])
        healing = calibration.heal(model.model.layers[1].self_attn)
        assert healing.weight is not None
        errors = [healing.error_before, healing.error_after, calibration.error(changed.model.layers[1].self_attn)]
        moments = calibration.moments
        return [
            walk.source,
            walk.converted,
            moments.inputs,
            moments.input_mean,
            moments.queries,
            moments.key_scale,
            calibration.contribution(),
            healing.weight,
            torch.tensor(errors, dtype=torch.float64),
        ]

    whole = measured()
    for tokens in (1, 4 * 24):  # one window at a time; four, then the other two
        monkeypatch.setattr("optimum_mla.calibrate.walk.TOKENS_PER_BATCH", tokens)
        assert all(
            torch.allclose(part, all_at_once, rtol=1e-9, atol=1e-11)
            for part, all_at_once in zip(measured(), whole, strict=True)
        )


@pytest.mark.parametrize("count", [1, 15, 17, 31, 33, 100])
def test_no_more_windows_are_measured_than_said(count: int) -> None:
    model = source_model("llama")
    walk = walk_through(model, token_ids(HELD_BACK * count, 3))
    calibration = LayerCalibration(walk, sources_of(model)[0])
    seen: list[Tensor] = []
    hook = walk.part("input_layernorm").register_forward_hook(lambda _, args, normed: seen.append(normed))
    calibration.error(walk.attention)
    compared = torch.cat(seen)
    seen.clear()
    calibration.damage(identity_mix(GROUPS, PAIRS))
    damaged = torch.cat(seen)
    hook.remove()
    normed, held = walk.input_norm(walk.source), deciding(HELD_BACK * count)
    assert torch.allclose(compared, normed[held])
    assert min(count, DECIDING_WINDOWS // 2) <= len(held) <= DECIDING_WINDOWS
    rest = normed[fitted(HELD_BACK * count)]
    assert len(rest) + len(held) == len(normed)
    assert all(any(torch.allclose(window, other) for other in rest) for window in damaged)
    assert min(len(rest), DAMAGE_WINDOWS // 2) <= len(damaged) <= DAMAGE_WINDOWS


@given(count=st.integers(1, 300))
def test_windows_are_held_back_or_fitted(count: int) -> None:
    held, rest = deciding(count).tolist(), fitted(count).tolist()
    if count < HELD_BACK:
        assert held == rest == list(range(count))
        return
    assert sorted(held + rest) == list(range(count))
    assert 1 <= len(held) <= min(DECIDING_WINDOWS, count // HELD_BACK)
    assert len({after - before for before, after in pairwise(held)}) <= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sources_own_attention_leaves_no_error(family: str) -> None:
    model = source_model(family)
    sources, walk = sources_of(model), walk_through(model)
    for layer in range(LAYERS):
        calibration = LayerCalibration(walk, sources[layer])
        assert calibration.error(model.model.layers[layer].self_attn) < 1e-5
        assert calibration.error(walk.attention) < 1e-5
        walk.advance()


@pytest.mark.parametrize("family", FAMILIES)
def test_error_is_relative_to_the_states_of_the_held_back_windows(family: str) -> None:
    walked = Walked(family)
    candidate = disturbed(walked.model, 1)
    candidate.model.layers[0] = walked.changed.model.layers[0]
    target, actual = states_after_attention(walked.model, 1)[HELD], states_after_attention(candidate, 1)[HELD]
    relative = (actual - target).square().sum(-1) / target.square().sum(-1)
    error = walked.calibration.error(candidate.model.layers[1].self_attn)
    assert error == pytest.approx(float(relative.mean().sqrt()), rel=1e-8)
    assert error > 1e-3
