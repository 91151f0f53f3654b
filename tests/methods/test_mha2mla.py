"""MHA2MLA against naive attention that rotates only the chosen pairs and projects with truncated weights."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from optimum_mla import MHA2MLA, MLATransformation
from optimum_mla.calibrate.layer import LayerCalibration
from optimum_mla.calibrate.walk import CalibrationWalk
from optimum_mla.core.errors import InvalidValueError
from optimum_mla.measure.memory import bytes_per_token
from optimum_mla.models.layer_source import LayerSource
from tests.cases import FAMILIES, source_model, token_ids
from tests.methods.oracle import RotatedPair, Weights, naive_model, truncated, whole_pairs

HALF = 8
"""Rotary pairs of a head in `cases.SIZES`."""
PAIRS = {"high": [0, 1, 2], "low": [5, 6, 7], "uniform": [0, 2, 5]}
"""Three of eight, by hand."""


@torch.no_grad()
def difference(first: torch.nn.Module, second: torch.nn.Module) -> float:
    ids = token_ids()
    return float((first(ids).logits.double() - second(ids).logits.double()).abs().max())


def expected_model(
    source: PreTrainedModel, chosen: list[list[list[int]]], rank: int, factorization: str
) -> PreTrainedModel:
    """The source with partial rotation and truncated weights; `chosen[layer][key head]` are the pairs that rotate."""

    def change(weights: Weights, layer: int) -> tuple[Weights, list[list[RotatedPair]]]:
        key, value = weights.key.clone(), weights.value.clone()
        free = [[d for d in range(2 * HALF) if d % HALF not in kept] for kept in chosen[layer]]
        rows = torch.cat([key[head, dims] for head, dims in enumerate(free)])
        if factorization == "joint":
            both = truncated(torch.cat([rows, value.flatten(0, 1)]), rank)
            rows, values = both[: len(rows)], both[len(rows) :]
        else:
            rows, values = truncated(rows, rank // 2), truncated(value.flatten(0, 1), rank - rank // 2)
        for head, dims in enumerate(free):
            key[head, dims] = rows[head * len(dims) : (head + 1) * len(dims)]
        pairs = [whole_pairs(kept, 2 * HALF) for kept in chosen[layer]]
        return weights._replace(key=key, value=values.view_as(value)), pairs

    return naive_model(source, change)


def chosen_by_name(source: PreTrainedModel, selection: str) -> list[list[list[int]]]:
    return [[PAIRS[selection]] * source.config.num_key_value_heads] * source.config.num_hidden_layers


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("factorization", "rank"), [("joint", 25), ("split", 25), ("joint", None)])
def test_is_partial_rotation_with_truncated_weights(family: str, factorization: str, rank: int | None) -> None:
    source = source_model(family, torch.float64)
    # Without a rank: as many as the weight has, so that only the rotation differs from the source.
    rank = rank or min(64, source.config.num_key_value_heads * (10 + 16))
    transformation = MHA2MLA(
        kv_lora_rank=rank, qk_rope_head_dim=6, rope_selection="uniform", factorization=factorization
    )
    converted = transformation(source, copy=True)
    expected = expected_model(source, chosen_by_name(source, "uniform"), rank, factorization)
    assert difference(converted, expected) <= 1e-5
    assert difference(converted, source) > 1e-2


@pytest.mark.parametrize("selection", PAIRS)
def test_selections_are_those_of_the_paper(selection: str) -> None:
    source = source_model("qwen3", torch.float64)
    converted = MHA2MLA(kv_lora_rank=25, qk_rope_head_dim=6, rope_selection=selection)(source, copy=True)
    assert difference(converted, expected_model(source, chosen_by_name(source, selection), 25, "joint")) <= 1e-5


@pytest.mark.parametrize("family", ["llama", "llama with biases", "qwen2", "qwen3", "llama multi-head, tied"])
def test_contributions_and_what_they_choose(family: str) -> None:
    source = source_model(family, torch.float64)
    ids = token_ids(3, 20)
    config = source.config
    groups, share = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    with torch.no_grad():
        states = source(ids, output_hidden_states=True).hidden_states
    scores = []
    for layer, hidden in zip(source.model.layers, states, strict=False):
        attention, normed = layer.self_attn, layer.input_layernorm(hidden).detach()
        queries = attention.q_proj(normed).detach().view(60, groups * share, 16)
        keys = attention.k_proj(normed).detach().view(60, groups, 16)
        if family == "qwen3":
            queries, keys = attention.q_norm(queries).detach(), attention.k_norm(keys).detach()
        score = torch.zeros(groups, HALF, dtype=torch.float64)
        for head in range(groups * share):
            for pair in range(HALF):
                query_norm = queries[:, head, [pair, pair + HALF]].norm(dim=-1)
                key_norm = keys[:, head // share, [pair, pair + HALF]].norm(dim=-1)
                score[head // share, pair] += (query_norm * key_norm).mean() / share
        scores.append(score)

    options = {"rope_selection": "contribution", "factorization": "joint"}
    transformation = MHA2MLA(kv_lora_rank=24, qk_rope_head_dim=6, calibration=ids, **options)
    walk = CalibrationWalk(LayerSource(source), ids)
    for layer in range(len(scores)):
        attention = walk.model.attention(layer)
        assert torch.allclose(LayerCalibration(walk, attention).contribution(), scores[layer], rtol=1e-5)
        walk.advance()
    chosen = [[row.topk(3).indices.sort().values.tolist() for row in score] for score in scores]
    converted = transformation(source, copy=True)
    assert [layer.self_attn.rope_pairs.tolist() for layer in converted.model.layers] == chosen
    assert len({tuple(pairs) for layer in chosen for pairs in layer}) > 1
    assert difference(converted, expected_model(source, chosen, 24, "joint")) <= 1e-5


def test_measuring_leaves_no_hook_and_the_mode_as_it_was() -> None:
    source = source_model("qwen3").train()
    MHA2MLA(kv_lora_rank=24, calibration=token_ids())(source, copy=True)
    assert source.training
    assert not any(module._forward_hooks for module in source.modules())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "transformation",
    [
        MHA2MLA(kv_cache_ratio=0.5, qk_rope_head_dim=4, rope_selection="low"),
        MHA2MLA(d_kv=8),
        MHA2MLA(kv_lora_rank=9, factorization="split"),
    ],
    ids=["ratio", "d_kv", "split"],
)
def test_live_cache_and_parameters_are_the_geometrys(family: str, transformation: MLATransformation) -> None:
    source = source_model(family, sliding_window=None) if "window" in family else source_model(family)
    before = source.num_parameters()
    source_bytes = bytes_per_token(source, token_ids(1, 20)).live
    converted = transformation(source)
    after = bytes_per_token(converted, token_ids(1, 20)).live
    assert after == converted.geometry.cache_bytes(bits=32)
    assert converted.num_parameters() - before == converted.geometry.parameters_added
    if transformation.budget.kv_cache_ratio and transformation.d_kv is None:
        assert after == source_bytes / 2


def test_d_kv_is_the_papers_rank_per_key_head() -> None:
    for family, key_heads in (("llama", 2), ("llama multi-head, tied", 4)):
        geometry = MHA2MLA(d_kv=8)(source_model(family)).geometry
        for layer in geometry.layers:
            assert (layer.kv_lora_rank, layer.qk_rope_head_dim, layer.num_rope_heads) == (8 * key_heads, 2, key_heads)


def test_options_give_the_same_conversion_again() -> None:
    for transformation in (MHA2MLA(d_kv=8), MHA2MLA(kv_lora_rank=20), MHA2MLA(energy=0.5), MHA2MLA()):
        again = MHA2MLA(**transformation.options)
        assert again.options == transformation.options
        assert again.signature == transformation.signature


@pytest.mark.parametrize("options", [{"kv_lora_rank": 8}, {"kv_cache_ratio": 0.5}, {"energy": 0.5}])
def test_two_sizes_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(InvalidValueError, match="d_kv"):
        MHA2MLA(d_kv=8, **options)


def test_d_kv_out_of_range_is_named_as_it_was_typed() -> None:
    with pytest.raises(InvalidValueError) as caught:
        MHA2MLA(d_kv=40)(source_model("llama"))
    assert caught.value.field == "d_kv"
    assert caught.value.received == 40


def test_energy_is_that_of_keys_and_values_together() -> None:
    source = source_model("llama")
    converted = MHA2MLA(energy=0.6)(source, copy=True)
    for layer, geometry in zip(source.model.layers, converted.geometry.layers, strict=True):
        stack = torch.cat([layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight]).detach().double()
        squares = torch.linalg.svdvals(stack).square()
        rank = geometry.kv_lora_rank
        assert squares[:rank].sum() >= 0.6 * squares.sum() > squares[: rank - 1].sum()
