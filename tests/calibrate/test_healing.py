"""The refit of the output projection."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optimum_mla.calibrate.layer import LayerCalibration
from tests.calibrate.walked import (
    FAMILIES,
    HELD,
    IDS,
    LAYERS,
    Walked,
    disturbed,
    sources_of,
    states_after_attention,
    walk_through,
)
from tests.cases import source_model


def with_output(attention: nn.Module, weight: Tensor | None) -> nn.Module:
    """A copy of the attention with another output projection, where one is given."""
    clone: Any = copy.deepcopy(attention)
    if weight is not None:
        clone.o_proj.weight.copy_(weight)
    return clone


HEALED = [*FAMILIES, "llama with biases"]


@pytest.mark.parametrize("family", HEALED)
@pytest.mark.parametrize("noise", [0.0, 0.01, 0.3, 3.0])
def test_healing_never_raises_the_held_back_error(family: str, noise: float) -> None:
    walked = Walked(family)
    attention = disturbed(walked.model, 1, noise).model.layers[1].self_attn
    weight = attention.o_proj.weight.clone()
    calibration = walked.calibration
    before, healing = calibration.error(attention), calibration.heal(attention)
    assert torch.equal(attention.o_proj.weight, weight)
    assert healing.error_before == pytest.approx(before, rel=1e-6)
    assert healing.error_after <= healing.error_before
    assert (healing.weight is None) == (healing.error_after == healing.error_before)
    assert calibration.error(with_output(attention, healing.weight)) <= before
    if noise == 3:  # what the layer before did is mended by chance only, what was done to this one surely
        assert healing.error_after < 0.9 * before


@pytest.mark.parametrize("family", HEALED)
def test_a_halved_output_projection_is_healed(family: str) -> None:
    model = source_model(family, torch.float64)
    walk = walk_through(model)
    calibration = LayerCalibration(walk, sources_of(model)[0])
    own = model.model.layers[0].self_attn
    attention = with_output(own, 0.5 * own.o_proj.weight)
    healing = calibration.heal(attention)
    assert healing.weight is not None
    assert healing.error_after < 0.05 * healing.error_before
    assert calibration.error(with_output(attention, healing.weight)) < 0.05 * healing.error_before
    # Much of what is left lies where the contexts hardly reach, so the weights themselves are only nearer.
    assert (healing.weight - own.o_proj.weight).norm() < 0.5 * (0.5 * own.o_proj.weight).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", HEALED)
def test_an_exact_candidate_is_not_made_worse(family: str, dtype: torch.dtype) -> None:
    model = source_model(family, dtype)
    sources, walk = sources_of(model), walk_through(model)
    for layer in range(LAYERS):
        calibration, attention = LayerCalibration(walk, sources[layer]), model.model.layers[layer].self_attn
        healing = calibration.heal(attention)
        assert healing.error_after <= healing.error_before < 1e-5
        assert calibration.error(with_output(attention, healing.weight)) < 1e-5
        walk.advance()


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_few_windows_are_enough_to_heal(count: int) -> None:
    walked = Walked("llama", IDS[:count])
    healing = walked.calibration.heal(walked.layer.self_attn)
    assert healing.error_after <= healing.error_before
    after = walked.calibration.error(with_output(walked.layer.self_attn, healing.weight))
    assert after <= walked.calibration.error(walked.layer.self_attn)


def test_the_refit_is_ridge_regression() -> None:
    walked = Walked("qwen3")
    attention = disturbed(walked.model, 1).model.layers[1].self_attn
    fitted = [window for window in range(len(IDS)) if window not in HELD]
    contexts: list[Tensor] = []
    hook = attention.o_proj.register_forward_pre_hook(lambda _, args: contexts.append(args[0]))
    walked.walk.output(attention, walked.converted)
    hook.remove()
    target = states_after_attention(walked.model, 1) - walked.converted
    root = (1 / states_after_attention(walked.model, 1).square().mean(-1)).sqrt()[..., None]
    x, y = contexts[0] * root, target * root
    weight = attention.o_proj.weight

    def refit(windows: list[int], ridge: float) -> Tensor:
        """Least squares with rows √λ·I appended: a change is held near zero."""
        a, b = x[windows].flatten(0, 1), (y - x @ weight.T)[windows].flatten(0, 1)
        size = (ridge * a.square().sum() / a.shape[1]).sqrt()
        a = torch.cat([a, size * torch.eye(a.shape[1])])
        return weight + torch.linalg.lstsq(a, torch.cat([b, torch.zeros(a.shape[1], b.shape[1])])).solution.T

    def error(candidate: Tensor) -> float:
        return float((y - x @ candidate.T)[HELD].square().mean().sqrt())

    ridge = min((1e-3, 1e-2, 1e-1), key=lambda ridge: error(refit(fitted, ridge)))
    healing = walked.calibration.heal(attention)
    assert healing.weight is not None
    assert healing.error_before == pytest.approx(error(weight), rel=1e-6)
    assert healing.error_after == pytest.approx(error(refit(fitted, ridge)), rel=1e-6)
    assert torch.allclose(healing.weight, refit(fitted, ridge), rtol=1e-6, atol=1e-8)
