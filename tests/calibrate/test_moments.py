"""Moments and contributions against slow explicit loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from optimum_mla.calibrate.layer import LayerCalibration
from tests.calibrate.walked import (
    FAMILIES,
    GROUPS,
    HEAD_DIM,
    HEADS,
    HELD,
    IDS,
    PAIRS,
    Heads,
    Walked,
    disturbed,
    layer_inputs,
    normed,
    pairs,
    sources_of,
    walk_through,
)
from tests.cases import source_model

FITTED = [window for window in range(len(IDS)) if window not in HELD]


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_are_those_of_a_slow_loop(family: str) -> None:
    walked = Walked(family, IDS[:3, :14])
    count, length = walked.ids.shape
    output = walked.layer.self_attn.o_proj.weight
    hidden_size = output.shape[0]
    second, mean, total = torch.zeros(hidden_size, hidden_size).double(), torch.zeros(hidden_size).double(), 0.0
    queries = torch.zeros(HEADS, HEAD_DIM, HEAD_DIM, dtype=torch.float64)
    key_scale = torch.zeros(GROUPS, dtype=torch.float64)
    for window in range(count):
        heads, rows = Heads(walked, window), walked.row_weights[window]
        for s in range(length):
            received = sum(float(heads.weights[h, t, s] * rows[t]) for h in range(HEADS) for t in range(length)) / HEADS
            share = 0.5 + 0.5 * received
            second += share * torch.outer(heads.x[s], heads.x[s])
            mean += share * heads.x[s]
            total += share
        for t in range(length):
            for h in range(HEADS):
                effect = float(rows[t]) * heads.spread(output, h, t)
                queries[h] += effect * torch.outer(heads.query[h, t], heads.query[h, t]) / (count * length)
        key_scale += heads.key_factor.square().sum(1) / (count * length)
    assert total == pytest.approx(count * length)
    mean = mean / total
    moments = walked.calibration.moments
    assert torch.allclose(moments.inputs, second / total - torch.outer(mean, mean), rtol=1e-8, atol=1e-10)
    assert torch.allclose(moments.input_mean, mean, rtol=1e-8, atol=1e-10)
    assert torch.allclose(moments.queries, queries, rtol=1e-8, atol=1e-8 * float(queries.abs().max()))
    assert torch.allclose(moments.key_scale, key_scale, rtol=1e-8)
    assert torch.equal(moments.key_scale, torch.ones(GROUPS).double()) == (family != "qwen3")


@pytest.mark.parametrize("family", [*FAMILIES, "llama with biases"])
def test_contributions_are_the_source_models_own(family: str) -> None:
    model = source_model(family, torch.float64)
    sources, walk = sources_of(model), walk_through(model)
    changed = disturbed(model, 0)
    for index, states in enumerate(layer_inputs(model)[:-1]):
        layer: Any = model.model.layers[index]
        attention, x = layer.self_attn, layer.input_layernorm(states[FITTED])
        query, key = (getattr(attention, f"{name}_proj")(x).unflatten(-1, (-1, HEAD_DIM)) for name in "qk")
        if hasattr(attention, "q_norm"):
            query, key = normed(attention.q_norm, query), normed(attention.k_norm, key)
        expected = torch.zeros(GROUPS, PAIRS, dtype=torch.float64)
        for head in range(HEADS):
            product = pairs(query[:, :, head]).abs() * pairs(key[:, :, head // 2]).abs()
            expected[head // 2] += product.mean((0, 1)) / 2
        assert torch.allclose(LayerCalibration(walk, sources[index]).contribution(), expected, rtol=1e-9)
        # The source's states count, whatever was converted before.
        walk.advance(changed.model.layers[0].self_attn if index == 0 else None)
