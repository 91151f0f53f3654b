"""GQA2MLA and X-EcoMLA, low ranks included, against naive attention with truncated weights, for every family."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from optimum_mla import GQA2MLA, XEcoMLA
from tests.cases import FAMILIES, SIZES, source_model, token_ids
from tests.methods.oracle import RotatedPair, Weights, naive_model, truncated, whole_pairs

HEAD = SIZES["head_dim"]
HALF = HEAD // 2


@torch.no_grad()
def difference(first: torch.nn.Module, second: torch.nn.Module) -> float:
    ids = token_ids()
    return float((first(ids).logits.double() - second(ids).logits.double()).abs().max())


def shared_rotary_key(
    source: PreTrainedModel, pairs: list[RotatedPair], rank: int, query_rank: int | None = None
) -> PreTrainedModel:
    """X-EcoMLA by its definition: [W_K, W_V] truncated, the rotating dims of all key heads replaced by their mean."""
    rotating = sorted(dim for pair in pairs for dim in (pair.first, pair.second))

    def change(weights: Weights, layer: int) -> tuple[Weights, list[list[RotatedPair]]]:
        groups = weights.key.shape[0]
        both = truncated(torch.cat([weights.key.flatten(0, 1), weights.value.flatten(0, 1)]), rank)
        key, value = both.view(2, groups, HEAD, -1).clone()
        key[:, rotating] = weights.key[:, rotating].mean(0, keepdim=True)
        bias = weights.key_bias.clone()
        bias[:, rotating] = weights.key_bias[:, rotating].mean(0, keepdim=True)
        query = weights.query
        if query_rank is not None:
            query = truncated(query.flatten(0, 1), query_rank).view_as(query)
        return Weights(query, key, value, bias), [pairs] * groups

    return naive_model(source, change)


@pytest.mark.parametrize("family", FAMILIES)
def test_low_rank_gqa2mla_is_the_source_with_truncated_weights(family: str) -> None:
    source = source_model(family, torch.float64)
    pairs = [whole_pairs(list(range(HALF)), HEAD)] * source.config.num_key_value_heads

    def change(weights: Weights, layer: int) -> tuple[Weights, list[list[RotatedPair]]]:
        key, value = truncated(weights.key.flatten(0, 1), 10), truncated(weights.value.flatten(0, 1), 11)
        return weights._replace(key=key.view_as(weights.key), value=value.view_as(weights.value)), pairs

    converted = GQA2MLA(kv_lora_rank=21)(source, copy=True)
    assert {(g.k_lora_rank, g.v_lora_rank) for g in converted.geometry.layers} == {(10, 11)}
    assert difference(converted, naive_model(source, change, normed_anew=True)) <= 1e-5
    assert difference(converted, source) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_x_ecomla_with_whole_pairs(family: str) -> None:
    source = source_model(family, torch.float64)
    converted = XEcoMLA(kv_lora_rank=20, qk_rope_head_dim=6, rope_selection="uniform")(source, copy=True)
    assert difference(converted, shared_rotary_key(source, whole_pairs([0, 2, 5], HEAD), 20)) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_x_ecomla_as_printed(family: str) -> None:
    source = source_model(family, torch.float64)
    # The last 4 of 16 dims turn like a head of 4: its frequencies are the source's numbers 0 and 4.
    pairs = [RotatedPair(12, 14, 0), RotatedPair(13, 15, 4)]
    converted = XEcoMLA(kv_lora_rank=20, qk_rope_head_dim=4, rope_selection="last")(source, copy=True)
    assert difference(converted, shared_rotary_key(source, pairs, 20)) <= 1e-5


@pytest.mark.parametrize("family", ["llama", "llama with biases", "llama with scaled rope", "qwen2", "qwen3"])
def test_x_ecomla_with_low_rank_queries(family: str) -> None:
    source = source_model(family, torch.float64)
    options = {"kv_lora_rank": 30, "q_lora_rank": 12, "qk_rope_head_dim": 8, "rope_selection": "low"}
    converted = XEcoMLA(**options)(source, copy=True)
    assert difference(converted, shared_rotary_key(source, whole_pairs([4, 5, 6, 7], HEAD), 30, 12)) <= 1e-5


@pytest.mark.parametrize("family", ["llama", "llama with yarn", "qwen3 with biases"])
def test_x_ecomla_shares_one_selection_by_contribution(family: str) -> None:
    source, ids = source_model(family, torch.float64), token_ids()
    options = {"rope_selection": "contribution", "factorization": "joint", "calibration": ids}
    converted = XEcoMLA(kv_lora_rank=30, qk_rope_head_dim=6, **options)(source, copy=True)
    for index, layer in enumerate(converted.model.layers):
        (chosen,) = layer.self_attn.rope_pairs.tolist()
        single = XEcoMLA(kv_lora_rank=30, qk_rope_head_dim=6, layers=[index], **options)(source, copy=True)
        expected = shared_rotary_key(source, whole_pairs(chosen, HEAD), 30)
        expected.model.layers = torch.nn.ModuleList(
            [(expected if other == index else source).model.layers[other] for other in range(3)]
        )
        assert difference(single, expected) <= 1e-5


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(
    "transformation",
    [GQA2MLA(), GQA2MLA(layers=[0]), GQA2MLA(layers=[1]), GQA2MLA(layers=[2])],
    ids=["all", "first", "middle", "last"],
)
def test_layers_with_and_without_a_window_keep_theirs(transformation: GQA2MLA, cache: str) -> None:
    config = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=1)
    assert config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    source = Qwen2ForCausalLM(config).eval()
    converted = transformation(source, copy=True)
    assert difference(source, converted) <= 1e-4
    ids = token_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, "cache_implementation": cache}
    assert torch.equal(converted.generate(ids, **options), source.generate(ids, **options))
