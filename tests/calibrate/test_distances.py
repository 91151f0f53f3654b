"""Distances between queries and keys, and second moments turned over them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_mla.calibrate.distances import distances, turned
from optimum_mla.calibrate.moments import FIRST_TOKENS, gather_moments
from optimum_mla.calibrate.states import LayerStates
from optimum_mla.calibrate.walk import CalibrationWalk
from optimum_mla.models.layer_source import LayerSource
from tests.cases import source_model, token_ids


@given(half=st.integers(1, 4), length=st.integers(1, 6), seed=st.integers(0, 99))
def test_turned_moments_are_those_of_turned_vectors(half: int, length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(3, 5, 2 * half, generator=generator, dtype=torch.float64)
    weights = torch.rand(3, length, generator=generator, dtype=torch.float64)
    angles = torch.outer(torch.arange(length).double(), torch.rand(half, generator=generator, dtype=torch.float64))
    pairs = torch.complex(vectors[..., :half], vectors[..., half:])[:, :, None] * torch.polar(
        torch.ones_like(angles), angles
    )
    there = torch.cat([pairs.real, pairs.imag], dim=-1)  # [H, N, L, D]
    expected = torch.einsum("hl,hnld,hnle->hde", weights, there, there)
    torch.testing.assert_close(turned(vectors.mT @ vectors, weights, angles.cos(), angles.sin()), expected)


@pytest.fixture
def states() -> LayerStates:
    source = LayerSource(source_model("llama", torch.float64))
    return LayerStates(CalibrationWalk(source, token_ids(3, 24)), source.attention(0))


@torch.no_grad()
def test_distances_weigh_what_an_error_of_a_logit_does(states: LayerStates, monkeypatch: pytest.MonkeyPatch) -> None:
    """The effect of a key is taken from the change of the output when its logit moves a little."""
    monkeypatch.setattr("optimum_mla.calibrate.distances.QUERY_STEP", 1)
    heads = states.heads(states.walk.converted)
    weights = states.weights(heads.query, heads.key)
    row = torch.rand(3, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found, total = distances(states, heads, weights, row, FIRST_TOKENS)
    count, step = weights.shape[1], 1e-6
    w_o = states.source.output()["o_proj.weight"].unflatten(1, (count, -1)).permute(1, 2, 0)  # [H, D, d]
    value = heads.value.repeat_interleave(count // heads.value.shape[1], dim=1)
    expected, everything = torch.zeros_like(found), torch.zeros_like(total)
    for query in range(24):
        p = weights[:, :, query]  # [B, H, L]
        for key in range(query + 1):
            logits = p.log()
            logits[..., key] += step
            change = ((logits.softmax(-1) - p)[:, :, None] @ value @ w_o)[:, :, 0] / step  # [B, H, d]
            effect = (change.square().sum(-1) / p[..., key] * row[:, query, None]).sum(0)
            everything += effect
            if key >= FIRST_TOKENS:
                expected[:, query - key] += effect
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(total, everything, rtol=1e-4, atol=1e-9)


@torch.no_grad()
def test_slow_pairs_keep_the_structure_of_the_queries(states: LayerStates) -> None:
    """The energy stays within each pair, and dims that hardly turn keep their correlations."""
    moments = gather_moments(states)
    half = moments.queries.shape[-1] // 2
    before, after = (
        moments_of.diagonal(dim1=1, dim2=2).unflatten(1, (2, half)).sum(1)
        for moments_of in (moments.queries, moments.relative_queries)
    )
    part = after / before
    torch.testing.assert_close(part, part[:, :1].expand_as(part))  # turning keeps the energy of a pair
    assert ((part > 0) & (part < 1)).all()  # without the first keys
    slow = [half - 1, 2 * half - 1]
    scaled = moments.relative_queries / part[:, :1, None]
    kept = scaled[:, slow][:, :, slow] - moments.queries[:, slow][:, :, slow]
    fast = scaled[:, [0, half]][:, :, [0, half]] - moments.queries[:, [0, half]][:, :, [0, half]]
    assert kept.norm() < 0.5 * fast.norm()
