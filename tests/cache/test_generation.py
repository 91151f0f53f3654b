"""Whole models over the latent cache: the same logits as over a dense copy of it, through every way of generating."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from optimum_mla.cache import LatentCache, LatentLayer
from optimum_mla.core.errors import InvalidValueError
from tests.cases import token_ids
from tests.nn.test_attention import FORMS, build, forced, padded_batch

BLOCK = 8
every_form = pytest.mark.parametrize("form", FORMS)
ALL_QUANTIZED = {"bits": 8, "residual_length": 0}


@pytest.fixture(autouse=True)
def _short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so short that these short texts fill several."""
    monkeypatch.setattr("optimum_mla.cache.layer.block_tokens", lambda width: BLOCK)


def generate(model: PreTrainedModel, ids: Tensor, **options: Any) -> Any:
    """Greedy unless told otherwise: the sequences and the cache."""
    defaults = {"max_new_tokens": 10, "do_sample": False, "return_dict_in_generate": True}
    return model.generate(ids, **{**defaults, **options})


def latent_layers(cache: Cache) -> list[LatentLayer]:
    return [layer for layer in cache.layers if isinstance(layer, LatentLayer)]


@pytest.mark.compat
@every_form
@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_generate_makes_a_latent_cache_and_gives_the_tokens_of_a_dynamic_one(family: str, form: str) -> None:
    model = build(family, form)
    ids, mask, _ = padded_batch()
    got = generate(model, ids, attention_mask=mask)
    assert type(got.past_key_values) is LatentCache
    assert len(latent_layers(got.past_key_values)) == (2 if form == "hybrid" else 3)
    plain = generate(model, ids, attention_mask=mask, cache_implementation="dynamic")
    assert type(plain.past_key_values) is DynamicCache
    assert torch.equal(got.sequences, plain.sequences)
    beams = {"attention_mask": mask, "num_beams": 3, "max_new_tokens": 6}
    expected = generate(model, ids, cache_implementation="dynamic", **beams)
    assert torch.equal(generate(model, ids, **beams).sequences, expected.sequences)


@pytest.mark.compat
def test_the_users_choice_of_a_cache_holds() -> None:
    model = build("Llama", "shared rotary key")
    model.config.latent_cache = dict(ALL_QUANTIZED)
    ids = token_ids(1, 12)
    static = generate(model, ids, cache_implementation="static")
    dynamic = generate(model, ids, cache_implementation="dynamic")
    assert isinstance(static.past_key_values, StaticCache)
    assert type(dynamic.past_key_values) is DynamicCache
    assert torch.equal(static.sequences, dynamic.sequences)
    mine = DynamicCache(config=model.config)
    assert generate(model, ids, past_key_values=mine).past_key_values is mine
    assert generate(model, ids, use_cache=False).past_key_values is None


def test_a_plain_forward_makes_a_latent_cache_too() -> None:
    model, ids = build("Llama", "full rope"), token_ids(1, 12)
    model.config.latent_cache = {"bits": 4, "residual_length": 4}
    assert type(model(ids).past_key_values) is LatentCache
    assert type(model.model(input_ids=ids).past_key_values) is LatentCache
    assert latent_layers(model(ids).past_key_values)[0].settings.bits == 4
    assert model(ids, use_cache=False).past_key_values is None
    assert not isinstance(model.train()(ids).past_key_values, LatentCache)


def over_a_dense_copy(cache: LatentCache) -> Cache:
    """The same tokens behind Transformers' contract, for which layers decode everything into two plain tensors."""
    return Cache(layers=copy.deepcopy(cache.layers))


@pytest.mark.parametrize(
    "settings",
    [ALL_QUANTIZED, {"bits": 4, "residual_length": 4, "rope_bits": 8}, {"bits": 4, "backend": "quanto"}],
    ids=["8 bits", "4 bits, window", "quanto, all in the window"],
)
@pytest.mark.parametrize("family", ["Llama", pytest.param("Qwen3", marks=pytest.mark.slow)])
@every_form
def test_logits_are_those_of_decoding_everything_first(form: str, family: str, settings: dict[str, Any]) -> None:
    model = build(family, form)
    ids, mask, positions = padded_batch()
    bounds = [9, 10, 11, 15, 16, 20]  # single tokens and chunks
    worst = 0.0
    for padded in (True, False):
        for implementation in ("eager", "sdpa"):
            model.set_attn_implementation(implementation)
            cache = model.make_cache(**settings)
            for start, end in zip([0, *bounds], bounds, strict=False):
                inputs = {"input_ids": ids[:, start:end]}
                if padded:
                    inputs |= {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
                with torch.no_grad():
                    with forced(model, absorb=False):
                        expected = model(**inputs, past_key_values=over_a_dense_copy(cache)).logits
                    for absorb in (True, False):
                        with forced(model, absorb):
                            got = model(**inputs, past_key_values=copy.deepcopy(cache)).logits
                        real = mask[:, start:end].bool() if padded else slice(None)
                        error = (got - expected)[real].abs().max() / expected[real].abs().max()
                        worst = max(worst, error.item())
                    model(**inputs, past_key_values=cache)
            assert cache.get_seq_length() == 20
            for layer in latent_layers(cache):
                assert sum(block.tokens for block in layer.blocks) >= (0 if "backend" in settings else 16)
    assert worst <= 1e-5


@pytest.mark.compat
@pytest.mark.parametrize("backend", ["hqq", "quanto"])
@every_form
def test_more_bits_come_closer_to_the_unquantized_logits(form: str, backend: str) -> None:
    model = build("Llama", form)
    ids = token_ids(2, 24)

    def logits(**settings: Any) -> Tensor:
        cache = model.make_cache(**settings)
        with torch.no_grad():
            pieces = [model(ids[:, start : start + 4], past_key_values=cache).logits for start in range(0, 24, 4)]
        return torch.cat(pieces, dim=1)

    exact = logits()
    errors = [
        ((logits(bits=bits, backend=backend, residual_length=0, group_size=8) - exact).norm() / exact.norm()).item()
        for bits in (8, 4, 2)
    ]
    assert 0 < errors[0] < 0.02
    assert errors[0] < 0.3 * errors[1] < errors[2]
    assert errors[1] < errors[2]
    in_the_window = logits(bits=4, backend=backend)
    assert (in_the_window - exact).abs().max() <= 1e-6 * exact.abs().max()  # sums of other blocks


@pytest.mark.compat
@pytest.mark.parametrize("settings", [ALL_QUANTIZED, {"bits": 4, "residual_length": 128}], ids=["quantized", "window"])
@every_form
def test_every_way_of_generating(form: str, settings: dict[str, Any]) -> None:
    model, assistant = build("Llama", form), build("Llama", "shared rotary key")
    model.config.latent_cache = dict(settings)
    assistant.config.latent_cache = dict(settings)
    ids = token_ids(1, 14)
    greedy = generate(model, ids).sequences
    ways: dict[str, dict[str, Any]] = {
        "beams": {"num_beams": 3},
        "sampling": {"do_sample": True, "temperature": 1.5},
        "several samples": {"do_sample": True, "num_return_sequences": 3},
        "assisted by itself": {"assistant_model": model},
        "assisted by another": {"assistant_model": assistant},
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "chunked prefill": {"prefill_chunk_size": 5},
    }
    in_window = settings["residual_length"] == 128
    for way, options in ways.items():
        results = []
        for _ in range(2):
            torch.manual_seed(5)
            results.append(generate(model, ids, **options))
        assert torch.equal(results[0].sequences, results[1].sequences), way
        assert results[0].sequences.shape[1] == 24, way
        assert ((results[0].sequences >= 0) & (results[0].sequences < 97)).all(), way
        assert type(results[0].past_key_values) is LatentCache, way
        for layer in latent_layers(results[0].past_key_values):
            assert layer.settings.bits == settings["bits"], way
            assert bool(layer.blocks) != in_window, way
        if in_window:
            if "assist" in way or way in ("prompt lookup", "chunked prefill"):
                assert torch.equal(results[0].sequences, greedy), way
            else:
                torch.manual_seed(5)
                expected = generate(model, ids, cache_implementation="dynamic", **options).sequences
                assert torch.equal(results[0].sequences, expected), way


@pytest.mark.compat
@pytest.mark.parametrize("settings", [{"bits": 4, "residual_length": 8}, {"bits": 8, "residual_length": 0}, {}])
@every_form
def test_one_cache_over_the_turns_of_a_conversation(form: str, settings: dict[str, Any]) -> None:
    model = build("Llama", form)
    cache = model.make_cache(**settings)
    ids = token_ids(1, 9)

    def said_to(ids: Tensor, cache: LatentCache) -> Tensor:
        # With a mask of its own: `generate` would take a generated padding token for padding.
        mask = torch.ones_like(ids)
        return generate(model, ids, attention_mask=mask, past_key_values=cache, max_new_tokens=6).sequences

    for turn in range(3):
        said = said_to(ids, cache)
        assert said.shape[1] == ids.shape[1] + 6
        assert cache.get_seq_length() == said.shape[1] - 1
        if not settings:
            assert torch.equal(said, said_to(ids, model.make_cache()))
        for layer in latent_layers(cache):
            assert layer.residual is None or layer.residual.tokens <= layer.settings.residual_length
        ids = torch.cat([said, token_ids(1, 5 + turn)], dim=1)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(said_to(token_ids(1, 9), cache), said_to(token_ids(1, 9), model.make_cache(**settings)))


@pytest.mark.parametrize("settings", [ALL_QUANTIZED, {"bits": 4, "residual_length": 4}, {"bits": 4, "rope_bits": 8}])
@every_form
def test_a_padded_row_gives_the_tokens_of_that_row_alone(form: str, settings: dict[str, Any]) -> None:
    model = build("Llama", form)
    ids, mask, _ = padded_batch()
    together = generate(model, ids, attention_mask=mask, past_key_values=model.make_cache(**settings)).sequences
    alone = generate(model, ids[:1, 4:], past_key_values=model.make_cache(**settings)).sequences
    assert torch.equal(together[:1, 4:], alone)
    unpadded = generate(model, ids[1:], past_key_values=model.make_cache(**settings)).sequences
    assert torch.equal(together[1:], unpadded)


@pytest.mark.parametrize("settings", [{}, ALL_QUANTIZED], ids=["plain", "quantized"])
@every_form
def test_windowed_layers_keep_transformers_own(form: str, settings: dict[str, Any]) -> None:
    model = build("Mistral", form)  # its window is 9
    model.config.latent_cache = dict(settings)
    ids, mask, _ = padded_batch()
    for options in ({}, {"num_beams": 3}):
        got = generate(model, ids, attention_mask=mask, **options)
        expected = generate(model, ids, attention_mask=mask, cache_implementation="dynamic", **options)
        assert torch.equal(got.sequences, expected.sequences)
        assert type(got.past_key_values) is LatentCache
        assert [type(layer) for layer in got.past_key_values.layers] == [DynamicSlidingWindowLayer] * 3
    looked_up = generate(model, ids[1:], prompt_lookup_num_tokens=3).sequences
    assert torch.equal(looked_up, generate(model, ids[1:], use_cache=False).sequences)
    assisted = generate(model, ids[1:], assistant_model=model).sequences
    assert torch.equal(assisted, looked_up)


def test_a_layer_of_the_source_keeps_a_dynamic_layer() -> None:
    cache = build("Qwen3", "hybrid").make_cache(bits=4)
    assert [type(layer) for layer in cache.layers] == [LatentLayer, DynamicLayer, LatentLayer]
    assert [layer.settings.bits for layer in latent_layers(cache)] == [4, 4]


def test_settings_of_a_cache_are_the_models_with_changes() -> None:
    model = build("Llama", "shared rotary key")
    assert not latent_layers(model.make_cache())[0].settings.quantized
    model.config.latent_cache = {"bits": 4, "group_size": 32}
    settings = latent_layers(model.make_cache(bits=2))[0].settings
    assert (settings.bits, settings.group_size) == (2, 32)
    for wrong in ({"bits": 5}, {"backend": "hq"}, {"group": 4}, {"rope_bits": 4}):
        with pytest.raises(InvalidValueError):
            model.make_cache(**wrong)


def test_the_cache_of_another_model_is_refused() -> None:
    model, ids = build("Llama", "shared rotary key"), token_ids(1, 6)
    for form in ("rotary key per head", "full rope", "hybrid"):
        with pytest.raises(InvalidValueError, match="cache"):
            model(ids, past_key_values=build("Llama", form).make_cache(bits=4))
    with pytest.raises(InvalidValueError, match="make_cache"):
        model(ids, past_key_values=LatentCache(model.make_cache().layers[:2]))


RELOAD = """
import sys, torch, optimum_mla
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.tensor([[int(i) for i in sys.argv[2].split(",")]])
out = model.generate(ids, max_new_tokens=10, do_sample=False, return_dict_in_generate=True)
layer = out.past_key_values.layers[0]
print(type(out.past_key_values).__name__, layer.settings.bits, layer.settings.backend, layer.get_seq_length())
print([tensor.dtype for tensor in layer.tensors].count(torch.uint8), layer.residual)
print(",".join(str(i) for i in out.sequences[0].tolist()))
"""


@pytest.mark.compat
def test_a_fresh_process_takes_the_settings_of_the_saved_config(tmp_path: Path) -> None:
    model = build("Llama", "shared rotary key")
    model.config.latent_cache = {"bits": 4, "backend": "hqq", "group_size": 32, "residual_length": 0}
    model.save_pretrained(tmp_path)
    ids = token_ids(1, 12)
    command = [sys.executable, "-c", RELOAD, str(tmp_path), ",".join(str(i) for i in ids[0].tolist())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    kind, stored, tokens = done.stdout.strip().splitlines()[-3:]
    assert kind == "LatentCache 4 hqq 21"
    assert stored == "1 None"
    assert tokens == ",".join(str(i) for i in generate(model, ids).sequences[0].tolist())


def test_repeated_rows_of_one_prompt_stay_alike() -> None:
    """`batch_repeat_interleave` on a filled cache: every copy goes on as the row alone."""
    model, ids = build("Llama", "rotary key rebuilt"), token_ids(1, 20)
    cache = model.make_cache(bits=4, residual_length=4)
    with torch.no_grad():
        model(ids[:, :12], past_key_values=cache)
        single = copy.deepcopy(cache)
        for layer in cache.layers:
            layer.batch_repeat_interleave(3)
        got = model(ids[:, 12:].expand(3, -1), past_key_values=cache).logits
        expected = model(ids[:, 12:], past_key_values=single).logits
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
