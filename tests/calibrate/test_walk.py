"""The walk against the states of the source model itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from optimum_mla.calibrate.layer import LayerCalibration
from optimum_mla.calibrate.walk import CalibrationWalk
from tests.calibrate.walked import (
    FAMILIES,
    IDS,
    LAYERS,
    disturbed,
    layer_inputs,
    sources_of,
    states_after_attention,
    walk_through,
)
from tests.cases import source_model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_walk_passes_through_the_models_own_states(family: str) -> None:
    model = source_model(family)
    walk = walk_through(model)
    for layer, states in enumerate(layer_inputs(model)):
        assert walk.layer == layer
        assert walk.converted is walk.source
        assert torch.allclose(walk.source, states, rtol=1e-5, atol=1e-5)
        if layer < LAYERS:
            assert torch.allclose(walk.after_attention, states_after_attention(model, layer), rtol=1e-5, atol=1e-5)
            walk.advance()
    final = model(IDS, output_hidden_states=True).hidden_states[-1]
    assert torch.allclose(model.model.norm(walk.source), final, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("replaced", [0, 1, 2])
def test_the_converted_stream_is_that_of_the_changed_model(family: str, replaced: int) -> None:
    model = source_model(family, torch.float64)
    changed = disturbed(model, replaced)
    walk = walk_through(model)
    own, other = layer_inputs(model), layer_inputs(changed)
    for layer in range(LAYERS):
        walk.advance(changed.model.layers[layer].self_attn if layer == replaced else None)
        assert torch.allclose(walk.source, own[layer + 1], rtol=1e-10, atol=1e-10)
        assert torch.allclose(walk.converted, other[layer + 1], rtol=1e-10, atol=1e-10)
        assert (walk.converted is walk.source) == (layer < replaced)
    assert (own[-1] - other[-1]).norm() > 1e-2 * own[-1].norm()


def test_a_half_precision_model_walks_in_float32_and_stays_as_it_is() -> None:
    model = source_model("llama", torch.bfloat16).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    walk = walk_through(model)
    calibration = LayerCalibration(walk, sources_of(model)[0])
    assert {walk.source.dtype, calibration.dtype, next(walk.attention.parameters()).dtype} == {torch.float32}
    assert calibration.moments.inputs.dtype == torch.float64
    walk.advance()
    assert model.training
    assert model.config._attn_implementation == model.model.layers[0].self_attn.config._attn_implementation
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])
    expected = layer_inputs(model.to(torch.float32))[1]
    assert torch.allclose(walk.source, expected, rtol=1e-4, atol=1e-4)


def big_tensors(walk: CalibrationWalk) -> int:
    """Different tensors of the states' shape that the walk holds, in containers too."""
    found: set[int] = set()
    pending = list(vars(walk).values())
    while pending:
        value = pending.pop()
        if isinstance(value, Tensor) and value.shape == walk.source.shape and value.is_floating_point():
            found.add(value.untyped_storage().data_ptr())
        elif isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list | tuple | set):
            pending += value
    return len(found)


@pytest.mark.parametrize("replaced", [False, True])
def test_memory_does_not_grow_with_the_layers(replaced: bool) -> None:
    model = source_model("llama", num_hidden_layers=6)
    sources, walk = sources_of(model), walk_through(model)
    fields = set(vars(walk))
    for layer in range(6):
        calibration: LayerCalibration = LayerCalibration(walk, sources[layer])
        assert calibration.moments.inputs.isfinite().all()
        assert big_tensors(walk) <= 4
        assert set(vars(walk)) == fields
        walk.advance(model.model.layers[layer].self_attn if replaced else None)
    assert walk.layer == 6
    assert big_tensors(walk) <= 4
