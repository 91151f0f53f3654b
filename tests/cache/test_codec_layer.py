"""The cache of codes for models whose weights are left alone: what is exact and stored, and all that a cache does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from optimum_mla.cache.codec_layer import CodecLayer, ExactTokens
from optimum_mla.convert.codec import fit_codec
from optimum_mla.measure.memory import live_cache_bytes
from optimum_mla.models.codec import ModelCodec
from optimum_mla.stack import CACHE_ARGUMENT
from tests.cases import source_model, token_ids

EXACT = ExactTokens(sinks=4, recent=8, together=4)
BUDGET = 0.4


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    return source_model("llama").eval()


@pytest.fixture(scope="module")
def codec(model: PreTrainedModel) -> ModelCodec:
    return fit_codec(model, token_ids(8, 48), BUDGET, exact=EXACT)


@torch.no_grad()
def run(model: PreTrainedModel, ids: Tensor, cache: Any, *cuts: int, **keywords: Any) -> Tensor:
    """The logits of a text that goes through a cache in chunks."""
    spans = list(zip((0, *cuts), (*cuts, ids.shape[1]), strict=True))
    given = {CACHE_ARGUMENT: cache, "use_cache": True}
    mask, positions = keywords.get("attention_mask"), keywords.get("position_ids")
    found = []
    for start, stop in spans:
        if mask is not None:
            given["attention_mask"] = mask[:, :stop]
        if positions is not None:
            given["position_ids"] = positions[:, start:stop]
        found.append(model(ids[:, start:stop], **given).logits)
    return torch.cat(found, dim=1)


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def naive_logits(model: PreTrainedModel, codec: ModelCodec, ids: Tensor, prompt: int) -> Tensor:
    """The logits after a prompt, token by token, from a plain cache in which old keys and values are replaced.

    Keys are turned with the rotary embedding of the model itself, one token at a time.
    """
    cache, coded, found = DynamicCache(config=model.config), 0, []
    rotary: Any = model.get_submodule("model.rotary_emb")
    for stop in (prompt, *range(prompt + 1, ids.shape[1] + 1)):
        start = 0 if stop == prompt else stop - 1
        with torch.no_grad():
            found.append(model(ids[:, start:stop], **{CACHE_ARGUMENT: cache}, use_cache=True).logits)
        while stop - coded - EXACT.recent >= EXACT.together:
            for place in range(coded, coded + EXACT.together):
                if place < EXACT.sinks:
                    continue
                cos, sin = (t[0, 0] for t in rotary(torch.zeros(1), torch.tensor([[place]])))
                for index, layer in enumerate(cache.layers):
                    key, value = layer.keys[:, :, place], layer.values[:, :, place]
                    half = key.shape[-1] // 2
                    flipped = torch.cat([key[..., half:], -key[..., :half]], dim=-1)
                    vector = torch.cat([(key * cos + flipped * sin).flatten(1), value.flatten(1)], dim=1)
                    one = codec.layers[index]
                    again = one.decode(one.encode(vector[:, None]))[:, 0]
                    key, value = (part.view_as(key) for part in again.chunk(2, dim=1))
                    flipped = torch.cat([-key[..., half:], key[..., :half]], dim=-1)
                    layer.keys[:, :, place], layer.values[:, :, place] = key * cos + flipped * sin, value
            coded += EXACT.together
    return torch.cat(found, dim=1)


def test_a_prompt_is_read_exactly_and_old_tokens_as_the_specification_says(
    model: PreTrainedModel, codec: ModelCodec
) -> None:
    ids = token_ids(2, 40)
    found = run(model, ids, codec.make_cache(model), *range(20, 40))
    with torch.no_grad():
        source = model(ids, use_cache=False).logits
    torch.testing.assert_close(found[:, :20], source[:, :20], rtol=0, atol=1e-5)
    torch.testing.assert_close(found, naive_logits(model, codec, ids, 20), rtol=0, atol=1e-5)
    assert 1e-4 < distance(found[:, 20:], source[:, 20:]) < 0.1


def test_without_such_a_cache_the_model_is_what_it_was(model: PreTrainedModel, codec: ModelCodec) -> None:
    ids = token_ids(2, 20)
    fresh = source_model("llama").eval()
    fresh.load_state_dict(model.state_dict())
    codec.make_cache(model)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, fresh(ids).logits)
        assert torch.equal(model(ids, use_cache=False).logits, fresh(ids, use_cache=False).logits)


@pytest.mark.parametrize("tokens", [1, 8, 11, 12, 13, 31])
@pytest.mark.parametrize("batch", [1, 3])
def test_live_bytes_are_those_that_were_told(
    model: PreTrainedModel, codec: ModelCodec, tokens: int, batch: int
) -> None:
    cache = codec.make_cache(model)
    run(model, token_ids(batch, tokens), cache)
    assert cache.get_seq_length() == tokens
    assert live_cache_bytes(cache) == batch * codec.cache_bytes(tokens, itemsize=4)


def test_the_budget_is_kept(model: PreTrainedModel, codec: ModelCodec) -> None:
    source = sum(2 * 2 * layer.width // 2 for layer in codec.layers.values())
    assert 0.9 * BUDGET * source < codec.bytes_per_token <= BUDGET * source


@pytest.mark.parametrize("side", ["positions", "mask alone"])
def test_left_padding_changes_nothing(model: PreTrainedModel, codec: ModelCodec, side: str) -> None:
    ids, pads = token_ids(2, 30), 9
    padded = torch.cat([torch.zeros(2, pads, dtype=torch.long), ids], dim=1)
    padded[0, :pads] = token_ids(1, 60)[:, -pads:]
    mask = torch.ones_like(padded)
    mask[1, :pads] = 0
    keywords = {"attention_mask": mask}
    if side == "positions":
        keywords["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    found = run(model, padded, codec.make_cache(model), pads + 20, pads + 25, **keywords)
    cache = codec.make_cache(model)
    layers = [layer for layer in cache.layers if isinstance(layer, CodecLayer)]
    run(model, padded, cache, pads + 20, **keywords)
    assert all(layer.starts.tolist() == [0, pads] for layer in layers)
    with torch.no_grad():
        source = model(padded, attention_mask=mask, position_ids=keywords.get("position_ids"), use_cache=False).logits
    torch.testing.assert_close(found[:, pads : pads + 20], source[:, pads : pads + 20], rtol=0, atol=1e-5)
    assert distance(found[1, pads + 20 :], source[1, pads + 20 :]) < 0.1
    held = layers[0].sinks[0, 1]
    whole = DynamicCache(config=model.config)
    run(model, padded, whole, **keywords)
    torch.testing.assert_close(held, whole.layers[0].keys[1, :, pads : pads + 4])


@pytest.mark.parametrize("family", ["gpt_neox", "qwen3", "glm4", "gemma2", "phi3", "cohere", "llama with scaled rope"])
def test_every_kind_of_attention_keeps_its_keys(family: str) -> None:
    """Rotations of part of the dims, of neighbouring dims, with a factor; norms on keys; windows in some layers."""
    source = source_model(family).eval()
    # Eight bits a channel: what is left is rounding.
    codec = fit_codec(source, token_ids(8, 48), 0.5, gain_groups=0, exact=EXACT)
    ids = token_ids(2, 40)
    found = run(source, ids, codec.make_cache(source), 20, 30)
    with torch.no_grad():
        wanted = source(ids, use_cache=False).logits
    torch.testing.assert_close(found[:, :20], wanted[:, :20], rtol=0, atol=1e-5)
    assert distance(found[:, 20:], wanted[:, 20:]) < 0.03


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_have_the_codes_of_their_own_keys(codec: ModelCodec, dtype: torch.dtype) -> None:
    half = source_model("llama", dtype).eval()
    ids = token_ids(2, 40)
    cache = codec.make_cache(half)
    found = run(half, ids, cache, 20, 30)
    assert found.dtype == dtype
    assert live_cache_bytes(cache) == 2 * codec.cache_bytes(40, itemsize=2)
    plain = run(half, ids, DynamicCache(config=half.config), 20, 30)
    assert torch.equal(found[:, :20], plain[:, :20])
    assert distance(found[:, 20:].float(), plain[:, 20:].float()) < 0.1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True},
        {"prompt_lookup_num_tokens": 3},
        {"prefill_chunk_size": 8},
    ],
    ids=str,
)
def test_generation(model: PreTrainedModel, codec: ModelCodec, options: dict[str, Any]) -> None:
    ids = token_ids(1 if "prompt_lookup_num_tokens" in options else 2, 24)
    cache = codec.make_cache(model)
    torch.manual_seed(1)
    common = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    made = model.generate(ids, **{CACHE_ARGUMENT: cache}, **{**common, **options})
    assert made.shape[1] == 36
    assert cache.get_seq_length() == 35
    rows = made.shape[0] * (options.get("num_beams", 1) if options.get("num_return_sequences", 1) == 1 else 1)
    # Candidates of speculative decoding that were refused may have pushed tokens out of the window.
    coded = (24, 28) if "prompt_lookup_num_tokens" in options else (24,)
    assert all(len(layer.keys) == rows and layer.coded in coded for layer in cache.layers)
    if not options:
        step = run(model, made[:, :-1], codec.make_cache(model), *range(24, 35))
        assert torch.equal(step[:, 23:].argmax(-1), made[:, 24:])


def test_rows_are_reordered_selected_and_repeated(model: PreTrainedModel, codec: ModelCodec) -> None:
    ids = token_ids(3, 30)
    pads = torch.tensor([0, 3, 6])
    mask = (torch.arange(30) >= pads[:, None]).long()
    more = token_ids(3, 33)[:, 30:]

    def after(order: list[int], change: Any) -> tuple[Tensor, Tensor]:
        caches = codec.make_cache(model), codec.make_cache(model)
        run(model, ids, caches[0], attention_mask=mask)
        change(caches[0])
        run(model, ids[order], caches[1], attention_mask=mask[order])
        given = {"use_cache": True, "attention_mask": torch.cat([mask, torch.ones(3, 3, dtype=torch.long)], 1)[order]}
        with torch.no_grad():
            return tuple(model(more[order], **{CACHE_ARGUMENT: cache}, **given).logits for cache in caches)  # type: ignore[return-value]

    for order, change in (
        ([2, 0, 0], lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0]))),
        ([2, 1], lambda cache: cache.batch_select_indices(torch.tensor([2, 1]))),
        ([0, 0, 1, 1, 2, 2], lambda cache: cache.batch_repeat_interleave(2)),
    ):
        torch.testing.assert_close(*after(order, change), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kept", [26, 21, 14, 2])
def test_a_cropped_cache_goes_on(model: PreTrainedModel, codec: ModelCodec, kept: int) -> None:
    """Cropping among the exact tokens, among the codes, and among the first tokens."""
    ids = token_ids(2, 40)
    cache = codec.make_cache(model)
    run(model, ids[:, :28], cache)
    cache.crop(kept - 28)
    assert cache.get_seq_length() == kept
    with torch.no_grad():
        again = model(ids[:, kept:], **{CACHE_ARGUMENT: cache}, use_cache=True).logits
        source = model(ids, use_cache=False).logits[:, kept:]
    assert cache.get_seq_length() == 40
    assert distance(again, source) < 0.1
    assert live_cache_bytes(cache) == 2 * codec.cache_bytes(40, itemsize=4)
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(run(model, ids, cache), model(ids, use_cache=False).logits, rtol=0, atol=1e-5)


def test_a_cache_of_another_model_is_refused_by_its_width(codec: ModelCodec) -> None:
    layer = CodecLayer(codec.layers[0], lambda span: (torch.ones(1), torch.ones(1)))
    with pytest.raises(ValueError, match="numbers a token, as the codec was fitted to"):
        layer.update(torch.zeros(1, 3, 5, 7), torch.zeros(1, 3, 5, 7))
    with pytest.raises(ValueError, match="crop: got 3"):
        layer.crop(3)


def test_a_cache_that_is_used_again_forgets_the_padding(model: PreTrainedModel, codec: ModelCodec) -> None:
    ids, mask = token_ids(2, 30), torch.ones(2, 30, dtype=torch.long)
    mask[1, :9] = 0
    cache = codec.make_cache(model)
    run(model, ids, cache, 20, attention_mask=mask)
    cache.reset()
    assert torch.equal(run(model, ids, cache, 20), run(model, ids, codec.make_cache(model), 20))
