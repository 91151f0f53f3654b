"""GQA2MLA: exact at full rank, TransMLA's factors, and the best approximation below."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from optimum_mla import GQA2MLA
from optimum_mla.report.memory import measured_cache_bytes_per_token
from tests.cases import FAMILIES, SIZES, source_model, token_ids
from tests.transforms.oracle import naive_model, truncated, whole_pairs


@torch.no_grad()
def largest_difference(first: torch.nn.Module, second: torch.nn.Module, length: int = 24) -> float:
    ids = token_ids(2, length)
    return float((first(ids).logits.double() - second(ids).logits.double()).abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_is_the_source_model(family: str) -> None:
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-5)):
        source = source_model(family, dtype)
        converted = GQA2MLA()(source, copy=True)
        assert converted.dtype == dtype
        assert largest_difference(source, converted) <= tolerance
        assert all(geometry.attention_form == "full" for geometry in converted.geometry.layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_generates_the_same_tokens(family: str) -> None:
    source = source_model(family)
    converted = GQA2MLA()(source, copy=True)
    ids = token_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False}
    assert torch.equal(converted.generate(ids, **options), source.generate(ids, **options))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.25])
def test_live_cache_is_what_was_asked_for(family: str, ratio: float) -> None:
    source = source_model(family, sliding_window=None) if "window" in family else source_model(family)
    converted = GQA2MLA(kv_cache_ratio=ratio)(source, copy=True)
    before, after = (measured_cache_bytes_per_token(model, token_ids(1, 20)) for model in (source, converted))
    assert after == ratio * before == converted.geometry.cache_bytes(bits=32)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_added_are_counted(family: str) -> None:
    for transformation in (GQA2MLA(), GQA2MLA(kv_lora_rank=21)):
        source = source_model(family)
        before = source.num_parameters()
        converted = transformation(source)
        assert converted.num_parameters() - before == converted.geometry.parameters_added


@pytest.mark.parametrize("family", ["llama", "qwen2", "llama multi-head, tied"])
@pytest.mark.parametrize("rank", [None, 26])
def test_factors_are_transmlas(family: str, rank: int | None) -> None:
    source = source_model(family, torch.float64)
    converted = GQA2MLA(kv_lora_rank=rank)(source, copy=True)
    key_heads = source.config.num_key_value_heads
    for before, after in zip(source.model.layers, converted.model.layers, strict=True):
        for side in "kv":
            weight = getattr(before.self_attn, f"{side}_proj").weight.detach()
            replicated = weight.view(key_heads, 16, 64).repeat_interleave(4 // key_heads, dim=0).flatten(0, 1)
            left, values, right = torch.linalg.svd(replicated.T, full_matrices=False)  # d × H·D
            kept = 13 if rank else key_heads * 16
            left, values, right = left[:, :kept], values[:kept], right[:kept]
            down = getattr(after.self_attn, f"{side}_a_proj").weight.detach()
            up = getattr(after.self_attn, f"{side}_b_proj").weight.detach()
            assert (down.shape, up.shape) == ((kept, 64), (64, kept))
            # Singular vectors are free in their sign, their outer products are not.
            assert torch.allclose(down @ down.T, torch.diag(values), atol=1e-8)
            assert torch.allclose(up.T @ up, torch.diag(values), atol=1e-8)
            assert torch.allclose(down.T @ down, (left * values) @ left.T, atol=1e-8)
            assert torch.allclose(up @ up.T, right.T @ torch.diag(values) @ right, atol=1e-8)
            assert torch.allclose(up @ down, (left * values @ right).T, atol=1e-8)


@pytest.mark.parametrize("family", FAMILIES)
def test_low_rank_is_the_source_with_truncated_weights(family: str) -> None:
    source = source_model(family, torch.float64)
    pairs = [whole_pairs(list(range(8)), 16)] * source.config.num_key_value_heads

    def change(weights, layer):
        key, value = (truncated(w.flatten(0, 1), rank).view_as(w) for w, rank in ((weights.key, 10), (weights.value, 11)))
        return weights._replace(key=key, value=value), pairs

    converted = GQA2MLA(kv_lora_rank=21)(source, copy=True)
    assert largest_difference(converted, naive_model(source, change)) <= 1e-5
    assert largest_difference(converted, source) > 1e-2
    assert {(g.k_lora_rank, g.v_lora_rank) for g in converted.geometry.layers} == {(10, 11)}


def test_energy_keeps_the_smallest_ranks_that_hold_it() -> None:
    source = source_model("qwen3")
    converted = GQA2MLA(energy=0.7)(source, copy=True)
    for layer, geometry in zip(source.model.layers, converted.geometry.layers, strict=True):
        for side, rank in (("k", geometry.k_lora_rank), ("v", geometry.v_lora_rank)):
            squares = torch.linalg.svdvals(getattr(layer.self_attn, f"{side}_proj").weight.detach().double()).square()
            assert squares[:rank].sum() >= 0.7 * squares.sum() > squares[: rank - 1].sum()


@pytest.mark.parametrize(
    ("options", "preserves"),
    [
        ({}, True),
        ({"kv_cache_ratio": 1.0}, True),
        ({"energy": 1.0}, True),
        ({"kv_cache_ratio": 0.5}, False),
        ({"energy": 0.9}, False),
    ],
)
def test_what_it_says_of_itself_is_true(options: dict[str, float], preserves: bool) -> None:
    source, transformation = source_model("llama"), GQA2MLA(**options)
    assert transformation.preserves_computation is preserves
    assert (largest_difference(source, transformation(source, copy=True)) <= 1e-4) is preserves


def test_layers_with_and_without_a_window_keep_theirs() -> None:
    sizes = {**SIZES, "eos_token_id": 96}
    sizes.pop("head_dim")
    config = Qwen2Config(**sizes, use_sliding_window=True, sliding_window=6, max_window_layers=1)
    assert config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    source = Qwen2ForCausalLM(config).eval()
    converted = GQA2MLA()(source, copy=True)
    assert largest_difference(source, converted) <= 1e-4
    ids = token_ids(1, 12)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    for cache in ("dynamic", "static"):
        generated = [m.generate(ids, cache_implementation=cache, **options) for m in (source, converted)]
        assert torch.equal(*generated)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_one_layer_alone_changes_the_outputs_no_more_than_rounding(layer: int) -> None:
    source = source_model("qwen2")
    converted = GQA2MLA(layers=[layer])(source, copy=True)
    assert largest_difference(source, converted) <= 1e-4
    forms = [geometry.attention_form for geometry in converted.geometry.layers]
    assert forms == ["full" if index == layer else "source" for index in range(3)]
    ids = token_ids(2, 10)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    for cache in ("dynamic", "static"):
        assert torch.equal(*[m.generate(ids, cache_implementation=cache, **options) for m in (source, converted)])
