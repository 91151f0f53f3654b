"""X-EcoMLA's initialization, piece by piece."""

from __future__ import annotations

import pytest
import torch

from optimum_mla import XEcoMLA
from tests.cases import FAMILIES, source_model, token_ids


def test_shared_rotary_key_is_the_average_of_the_last_columns() -> None:
    source = source_model("llama with biases", torch.float64)
    module = source.model.layers[1].self_attn
    attention = XEcoMLA(kv_lora_rank=30, rope_selection="last")(source, copy=True).model.layers[1].self_attn
    key = module.k_proj.weight.view(2, 16, 64)
    assert torch.allclose(attention.kv_a_proj_with_mqa.weight[30:], key[:, 8:].mean(0), atol=1e-12)
    assert torch.allclose(attention.kv_a_proj_with_mqa.bias[30:], module.k_proj.bias.view(2, 16)[:, 8:].mean(0))
    assert attention.rope_pairs.tolist() == [[0, 2, 4, 6]]
    assert torch.equal(attention.q_proj.weight, module.q_proj.weight)  # already position-free dims first


def test_latent_is_the_svd_of_keys_and_values_together() -> None:
    source = source_model("llama", torch.float64)
    module = source.model.layers[0].self_attn
    stacked = torch.cat([module.k_proj.weight, module.v_proj.weight])
    attention = XEcoMLA(kv_lora_rank=20, rope_selection="last")(source, copy=True).model.layers[0].self_attn
    left, spectrum, right = torch.linalg.svd(stacked)
    best = (left[:, :20] * spectrum[:20] @ right[:20]).view(2, 2, 16, 64)  # keys and values, G heads
    rebuilt = (attention.kv_b_proj.weight @ attention.kv_a_proj_with_mqa.weight[:20]).view(4, 24, 64)
    assert torch.allclose(rebuilt[:, :8], best[0, :, :8].repeat_interleave(2, 0), atol=1e-9)
    assert torch.allclose(rebuilt[:, 8:], best[1].repeat_interleave(2, 0), atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "llama with biases", "qwen2", "qwen3"])
def test_equal_key_heads_and_whole_pairs_make_it_partial_rotation(family: str) -> None:
    """Where all key heads are one, sharing the rotary key loses nothing: with every pair but one kept, only that pair
    stops rotating, and it hardly turns over so few tokens at its low frequency."""
    source, ids = source_model(family), token_ids(2, 6)
    with torch.no_grad():
        for layer in source.model.layers:
            for projection in ("weight", "bias"):
                key = getattr(layer.self_attn.k_proj, projection)
                if key is not None:
                    key[16:] = key[:16]
        expected = source(ids).logits
        converted = XEcoMLA(kv_lora_rank=64, qk_rope_head_dim=14, rope_selection="high")(source, copy=True)
        assert (converted(ids).logits - expected).abs().max() < 2e-3 * expected.abs().max()


def test_full_query_rank_changes_nothing() -> None:
    source, ids = source_model("qwen2"), token_ids()
    with torch.no_grad():
        plain = XEcoMLA(kv_lora_rank=30)(source, copy=True)(ids).logits
        factorized = XEcoMLA(kv_lora_rank=30, q_lora_rank=64)(source, copy=True)(ids).logits
    assert (plain - factorized).abs().max() < 1e-4


def test_energy_chooses_the_rank_of_each_layer_and_side() -> None:
    source = source_model("llama")
    with torch.no_grad():  # layer 1: keys and values of rank 3
        thin = torch.randn(64, 3) @ torch.randn(3, 64)
        source.model.layers[1].self_attn.k_proj.weight.copy_(thin[:32])
        source.model.layers[1].self_attn.v_proj.weight.copy_(thin[32:])
    converted = XEcoMLA(energy=0.95, q_energy=0.5)(source, copy=True)
    for layer, geometry in enumerate(converted.geometry.layers):
        module = source.model.layers[layer].self_attn
        for weight, energy, rank in (
            (torch.cat([module.k_proj.weight, module.v_proj.weight]), 0.95, geometry.kv_lora_rank),
            (module.q_proj.weight, 0.5, geometry.q_lora_rank),
        ):
            squares = torch.linalg.svdvals(weight.detach().double()).square()
            assert squares[:rank].sum() >= energy * squares.sum() > squares[: rank - 1].sum()
    assert converted.geometry.layers[1].kv_lora_rank <= 3 < converted.geometry.layers[0].kv_lora_rank


def test_latent_norm_starts_near_the_latents_own_size() -> None:
    source, ids = source_model("llama"), token_ids(4, 64)
    normed = XEcoMLA(kv_lora_rank=40, q_lora_rank=40, latent_norm=True)(source, copy=True)
    attention = normed.model.layers[0].self_attn
    with torch.no_grad():
        states = normed.model.layers[0].input_layernorm(normed.model.embed_tokens(ids))
        for projection, norm in (("kv_a_proj_with_mqa", "kv_a_layernorm"), ("q_a_proj", "q_a_layernorm")):
            latent = getattr(attention, projection)(states)[..., :40]
            ratio = getattr(attention, norm).weight.mean() / latent.square().mean().sqrt()
            assert 0.7 < ratio < 1.4


def test_hybrid_preset_converts_eight_of_sixteen_layers() -> None:
    source = source_model("llama", num_hidden_layers=16)
    converted = XEcoMLA(kv_cache_ratio=0.5, layers="x-ecomla-hybrid")(source)
    forms = [geometry.attention_form for geometry in converted.geometry.layers]
    assert [layer for layer, form in enumerate(forms) if form == "decoupled"] == [1, 3, 5, 7, 8, 10, 12, 14]
    assert converted.geometry.cache_ratio == 0.75


def test_key_norm_families_cache_one_factor_per_key_head() -> None:
    assert "qwen3" in FAMILIES
    (geometry,) = set(XEcoMLA(kv_lora_rank=20)(source_model("qwen3")).geometry.layers)
    assert geometry.num_up_heads == 4  # every query head has its own, and reads its key head's factor
    assert geometry.cache_numbers == 20 + 8 + 2
