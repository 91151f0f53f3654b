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
from optimum_mla.codec import total_bits
from optimum_mla.convert import Run
from optimum_mla.core.errors import InvalidValueError, UnsupportedModelError
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
    ("llama", {"rope_cache": "cached"}),
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
        assert measured_cache_bytes_per_token(model, IDS[:1]) == model.geometry.cache_bytes(bits=32)  # in float32
        assert model.geometry.cache_bytes() <= budget * 2 * numbers
        cache = model.make_cache()
        model(IDS[:2], **cache_argument(model, cache))
        settings = cache.layers[0].settings
        predicted = sum(predicted_bytes(layer, settings, 48, 4) for layer in model.geometry.layers)
        extra = sum(len(block.first.places) for layer in cache.layers for block in layer.blocks) - 2 * 3 * 4
        rank = model.geometry.layers[0].kv_lora_rank
        assert live_cache_bytes(cache) >= 2 * predicted
        assert extra > 0 or live_cache_bytes(cache) == 2 * predicted
        assert rank % 8 == 0


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


def test_a_cached_rotary_key_takes_its_part_of_the_budget() -> None:
    model = converted(budget=0.3, rope_cache="cached")
    for g in model.geometry.layers:
        assert (g.rope_cache, g.attention_form) == ("cached", "decoupled")
        # 0.3 of 64 numbers in 16 bits are 38.4 bytes, of which the codes take what the rotary key leaves, in bytes.
        assert total_bits(g.channel_bits) // 8 + 2 * g.rope_numbers in (37, 38)


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
    with pytest.raises(InvalidValueError, match=r"kv_cache_budget: got 0\.25, allowed: 0\.258 to 0\.5 for this model"):
        GQA2MLA(kv_cache_budget=0.25, calibration=IDS, rope_cache="cached", qk_rope_head_dim=16)(source_model("llama"))
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
