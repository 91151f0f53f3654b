"""A budget of bytes: live bytes are those of the budget, and codes compute the same in every cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from optimum_mla import GQA2MLA, MHA2MLA, CalibrationStatistics, QuantizeLatentCache
from optimum_mla.cache.sizes import predicted_bytes
from optimum_mla.calibrate.walk import CalibrationWalk
from optimum_mla.codec import total_bits, total_channels
from optimum_mla.convert import Run
from optimum_mla.core.errors import InvalidValueError, UnsupportedModelError
from optimum_mla.core.geometry import MLAGeometry
from optimum_mla.measure.memory import live_cache_bytes, measured_cache_bytes_per_token
from optimum_mla.models.layer_source import LayerSource
from optimum_mla.stack import cache_argument
from tests.cases import source_model, token_ids

IDS = token_ids(12, 48)
CASES = [
    ("llama", {}),
    ("llama", {"positional": "decoupled"}),
    ("llama with yarn", {"qk_rope_head_dim": 16}),
    ("llama multi-head, tied", {"positional": "decoupled"}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("qwen3 with biases", {"positional": "decoupled"}),
    ("qwen3", {"rope_cache": "cached"}),
    ("llama", {"rope_cache": "cached"}),
    ("llama with yarn", {"rope_cache": "cached"}),
    ("qwen2", {"rope_cache": "cached"}),
    ("llama multi-head, tied", {"rope_cache": "cached", "shared_rope": True}),
]


def converted(family: str = "llama", budget: float = 0.25, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A converted model, in float64 so that differences of rounding do not turn a code into the next one."""
    return GQA2MLA(kv_cache_budget=budget, calibration=IDS, **options)(source_model(family, dtype)).eval()


@pytest.mark.parametrize(("family", "options"), CASES, ids=str)
def test_live_bytes_are_the_budget(family: str, options: dict[str, Any]) -> None:
    source = source_model(family)
    numbers = source.config.num_hidden_layers * 2 * source.config.num_key_value_heads * source.config.head_dim
    for budget in (0.25, 0.125):
        model = converted(family, budget, torch.float32, **options)
        assert model.geometry.cache_ratio == pytest.approx(budget, rel=0.01)
        assert model.geometry.cache_bytes() <= budget * 2 * numbers
        cache = model.make_cache()
        model(IDS[:2], **cache_argument(model, cache))
        settings = cache.layers[0].settings
        predicted = sum(predicted_bytes(layer, settings, 48, 4) for layer in model.geometry.layers)
        # Tokens that are exempt because they would be clipped are found at run time.
        found = [
            part for layer in cache.layers for block in layer.blocks for part in (block.first, block.second) if part
        ]
        beyond = sum((len(part.places) - 2 * 4) * (part.exempt.shape[1] * 4 + 8) for part in found)
        assert live_cache_bytes(cache) == 2 * predicted + beyond
        if not beyond:
            assert measured_cache_bytes_per_token(model, IDS[:1]) == model.geometry.cache_bytes(bits=32)  # in float32
        assert all(layer.kv_lora_rank % 8 == 0 for layer in model.geometry.layers)


@pytest.mark.parametrize(("family", "options"), CASES, ids=str)
@torch.no_grad()
def test_every_cache_gives_the_same_logits(family: str, options: dict[str, Any]) -> None:
    model = converted(family, 0.2, **options)
    ids = IDS[:2]
    whole = model(ids, use_cache=False).logits
    for cache in (
        model.make_cache(),
        model.make_cache(codes=False),
        DynamicCache(config=model.config),
        StaticCache(config=model.config, max_cache_len=48),
    ):
        pieces = [ids[:, :20], ids[:, 20:30], *ids[:, 30:].split(1, dim=1)]
        seen = [model(piece, **cache_argument(model, cache)).logits for piece in pieces]
        assert torch.allclose(torch.cat(seen, dim=1), whole, atol=1e-4)
    cache = model.make_cache()
    model(ids, **cache_argument(model, cache))
    cache.crop(-10)
    cache.reorder_cache(torch.tensor([1, 0]))
    cropped = model(ids.flip(0)[:, 38:], **cache_argument(model, cache)).logits
    assert torch.allclose(cropped, whole.flip(0)[:, 38:], atol=1e-4)


@torch.no_grad()
def test_padding_is_coded_and_first_tokens_are_not() -> None:
    model = converted()
    ids, short = IDS[:2], IDS[:1, :30]
    padded = torch.cat([torch.zeros(1, 18, dtype=torch.long), short], dim=1)
    batch, mask = torch.cat([padded, ids[:1]]), torch.ones(2, 48, dtype=torch.long)
    mask[0, :18] = 0
    new = {"max_new_tokens": 6, "do_sample": False}
    together = model.generate(batch, attention_mask=mask, **new)[:, 48:]
    assert torch.equal(together[:1], model.generate(short, **new)[:, 30:])
    assert torch.equal(together[1:], model.generate(ids[:1], **new)[:, 48:])
    cache = model.make_cache()
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    model(batch, attention_mask=mask, position_ids=positions, **cache_argument(model, cache))
    places = {tuple(place) for place in cache.layers[0].blocks[0].first.places.tolist()}
    assert {(0, 18 + i) for i in range(4)} | {(1, i) for i in range(4)} <= places


@torch.no_grad()
def test_generation_modes() -> None:
    model, ids = converted(), IDS[:2, :12]
    greedy = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False), greedy)
    beams = model.generate(ids, max_new_tokens=8, do_sample=False, num_beams=3)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False, num_beams=3, use_cache=False), beams)
    drafted = model.generate(ids[:1], max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(drafted, greedy[:1])


def test_more_bits_lose_less_and_the_walk_sees_the_codes() -> None:
    source, errors = source_model("llama"), []
    logits = source(IDS[:4]).logits
    for budget in (0.06, 0.12, 0.25, 0.5):
        model = converted(budget=budget)
        errors.append(float((model(IDS[:4]).logits.float() - logits).norm() / logits.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02
    run = Run(GQA2MLA(kv_cache_budget=0.06, calibration=IDS), source_model("llama"))
    attentions = dict(run.steps())
    walk = CalibrationWalk(LayerSource(source), IDS)
    walk.advance(attentions[0])
    coded = walk.converted
    walk = CalibrationWalk(LayerSource(source), IDS)
    attentions[0].geometry = replace(attentions[0].geometry, channel_bits=())
    walk.advance(attentions[0])
    assert not torch.equal(walk.converted, coded)


def test_saved_models_are_the_same_again(tmp_path: Path) -> None:
    model = converted("qwen2")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.geometry == model.geometry
    assert any(layer.channel_bits != again.geometry.layers[0].channel_bits for layer in again.geometry.layers)
    assert torch.equal(again(IDS[:1]).logits, model(IDS[:1]).logits)


def test_a_cached_rotary_key_is_coded_within_the_budget() -> None:
    logits = source_model("llama", torch.float64)(IDS[:4]).logits
    model = converted(budget=0.3, rope_cache="cached", rank_allocation="uniform")
    for g in model.geometry.layers:
        assert (g.rope_cache, g.attention_form) == ("cached", "decoupled")
        # 0.3 of 64 numbers in 16 bits are 38.4 bytes.
        assert (total_bits(g.channel_bits) + total_bits(g.rope_channel_bits)) // 8 in (37, 38)
        assert total_channels(g.rope_channel_bits) == g.qk_rope_head_dim > 0
    assert float((model(IDS[:4]).logits - logits).norm() / logits.norm()) < 0.15


def test_layers_that_share_a_rotary_key_keep_all_of_it() -> None:
    model = converted("llama multi-head, tied", 0.1, rope_cache="cached", shared_rope=True)
    assert len({layer.qk_rope_head_dim for layer in model.geometry.layers}) == 1
    assert all(len(layer.rope_channel_bits) == 1 for layer in model.geometry.layers)
    pairs = [layer.self_attn.rope_pairs for layer in model.model.layers]
    assert all(torch.equal(pairs[0], other) for other in pairs[1:])


def test_bytes_go_to_the_layers_whose_errors_reach_the_predictions() -> None:
    source = source_model("llama")
    with torch.no_grad():  # Nothing of what this layer adds to the state is left to lose.
        source.model.layers[1].self_attn.o_proj.weight.mul_(1e-3)
    budget = GQA2MLA(kv_cache_budget=0.25, calibration=IDS)
    assert budget.rank_allocation == "error"
    run = Run(budget, source)
    bits = [total_bits(run.results[layer].geometry.channel_bits) for layer, _ in run.steps()]
    assert bits[1] == 128 < min(bits[0], bits[2])  # half of the uniform share
    assert 0.99 * 3 * 256 <= sum(bits) <= 3 * 256


@torch.no_grad()
def test_factors_of_key_norms_are_coded() -> None:
    model = converted("qwen3", 0.4, positional="decoupled")
    attention = model.model.layers[1].self_attn
    g = attention.geometry
    assert (g.second_bits, g.scale_numbers) == (((8, 2),), 2)
    cache = model.make_cache()
    model(IDS[:2], **cache_argument(model, cache))
    found = cache.layers[1].blocks[0].open().key_factors + g.factor_centre  # [B, T, G]
    kept = (found / attention.key_factor_scale)[:, 4:]
    states: list[torch.Tensor] = []
    hook = attention.register_forward_pre_hook(
        lambda _, args, kwargs: states.append(kwargs["hidden_states"]), with_kwargs=True
    )
    model(IDS[:2])
    hook.remove()
    keys = attention.k_scale_proj(states[0]).unflatten(-1, (2, 16))
    exact = (keys.square().mean(-1) + attention.q_norm.eps).rsqrt()[:, 4:]
    # Half a step of 1/192 of the mean factor.
    assert ((kept - exact).abs() <= 0.51 / attention.key_factor_scale).all()
    assert (kept != exact).any()


def test_codes_of_a_rotary_key_are_refused_where_they_do_not_fit() -> None:
    cached = {"attention_form": "decoupled", "qk_rope_head_dim": 16, "kv_lora_rank": 8, "channel_bits": ((4, 8),)}
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    MLAGeometry(**sizes, **cached, rope_channel_bits=((4, 8), (3, 8)))
    with pytest.raises(InvalidValueError, match=r"rope_channel_bits: got .* allowed: bits of 16 dims"):
        MLAGeometry(**sizes, **cached, rope_channel_bits=((4, 8),))
    with pytest.raises(InvalidValueError, match="rope_channel_bits"):
        MLAGeometry(**sizes, **cached, rope_cache="rebuilt", rope_channel_bits=((4, 16),))
    with pytest.raises(InvalidValueError, match="factor_bits: got 4, allowed: 0, 8"):
        MLAGeometry(**sizes, **cached, factor_bits=4)
    with pytest.raises(InvalidValueError, match="qk_rope_head_dim: got 12, allowed: multiples of 8 from 8 to 30"):
        converted(rope_cache="cached", qk_rope_head_dim=12)


def test_training_goes_through_the_codes() -> None:
    model = converted().train()
    before = model(IDS[:4], labels=IDS[:4]).loss
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        model(IDS[:4], labels=IDS[:4]).loss.backward()
        down = model.model.layers[0].self_attn.kv_a_proj.weight
        assert down.grad is not None
        assert down.grad.abs().sum() > 0
        optimizer.step()
    assert model(IDS[:4], labels=IDS[:4]).loss < before


def test_statistics_serve_a_budget(tmp_path: Path) -> None:
    source = source_model("llama")
    statistics = CalibrationStatistics.gather(source, IDS, tmp_path)
    logits = source(IDS[:4]).logits
    model = GQA2MLA(kv_cache_budget=0.25, calibration=statistics)(source)
    assert model.geometry.cache_ratio == pytest.approx(0.25, rel=0.01)
    assert float((model(IDS[:4]).logits - logits).norm() / logits.norm()) < 0.1


def test_what_has_no_codes_is_refused() -> None:
    with pytest.raises(InvalidValueError, match=r"kv_cache_budget: got 0\.7, allowed: above 0, up to 0\.5"):
        GQA2MLA(kv_cache_budget=0.7, calibration=IDS)
    with pytest.raises(InvalidValueError, match="allowed: nothing with mha2mla"):
        MHA2MLA(kv_cache_budget=0.25, calibration=IDS)
    with pytest.raises(InvalidValueError, match="without a calibrated factorization"):
        GQA2MLA(kv_cache_budget=0.25)
    with pytest.raises(InvalidValueError, match="latent_norm"):
        GQA2MLA(kv_cache_budget=0.25, calibration=IDS, rope_cache="cached", latent_norm=True)
    with pytest.raises(InvalidValueError, match=r"kv_cache_budget: got 0\.001, allowed: 0\.00781 to 0\.5"):
        GQA2MLA(kv_cache_budget=0.001, calibration=IDS)(source_model("llama"))
    with pytest.raises(UnsupportedModelError, match="layer 0 has a sliding window"):
        GQA2MLA(kv_cache_budget=0.25, calibration=IDS)(source_model("mistral with a window"))
    model = converted()
    with pytest.raises(UnsupportedModelError, match="its latents are codes already"):
        QuantizeLatentCache(bits=4)(model)
    with pytest.raises(InvalidValueError, match="bits: got 4"):
        model.make_cache(bits=4)


def test_the_form_goes_by_the_shape() -> None:
    assert {layer.attention_form for layer in converted().geometry.layers} == {"full"}
    many = source_model("llama", num_attention_heads=8, num_key_value_heads=8, head_dim=8)
    model = GQA2MLA(kv_cache_budget=0.25, calibration=IDS)(many)
    assert {layer.attention_form for layer in model.geometry.layers} == {"decoupled"}
    with pytest.raises(InvalidValueError, match="positional: got 'by shape'"):
        GQA2MLA(kv_cache_ratio=0.25, calibration=IDS, positional="by shape")
