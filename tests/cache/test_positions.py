"""Keys that are rotated after the cache get the positions that their tokens were given, whatever these are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

from optimum_mla import GQA2MLA
from optimum_mla.cache.positions import CachedPositions
from optimum_mla.core.errors import InvalidValueError
from optimum_mla.stack import cache_argument
from tests.cases import source_model, token_ids
from tests.nn.test_attention import FORMS, build

IDS = token_ids(2, 16)
CPU = torch.device("cpu")


def through(model: Any, cache: Any, positions: Tensor, bounds: list[int], mask: Tensor | None = None) -> Tensor:
    """Logits of `IDS` with given positions, fed in pieces."""
    pieces = []
    for start, stop in zip([0, *bounds], bounds, strict=False):
        keywords = {} if mask is None else {"attention_mask": mask[:, :, start:stop, :stop]}
        pieces.append(model(IDS[:, start:stop], position_ids=positions[:, start:stop], cache=cache, **keywords).logits)
    return torch.cat(pieces, dim=1)


JUMP = torch.cat([torch.arange(7), torch.arange(30, 39)])[None]
BY_ROW = torch.stack([torch.arange(16), torch.cat([torch.arange(5), torch.arange(9, 20)])])
BACK = torch.cat([torch.arange(10), torch.arange(4, 10)])[None]


@pytest.mark.parametrize("positions", [JUMP, BY_ROW, BACK], ids=["a jump", "by row", "back"])
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_any_positions_give_the_logits_of_one_pass(form: str, positions: Tensor) -> None:
    model = build("Llama", form)
    expected = model(IDS, position_ids=positions, use_cache=False, attention_mask=causal(16)).logits
    for bounds in ([16], [7, 16], [5, 6, 9, *range(10, 17)], [12, *range(13, 17)]):
        for settings in ({}, {"bits": 8, "residual_length": 32}):
            got = through(model, model.make_cache(**settings), positions, bounds, causal(16))
            assert (got - expected).abs().max() <= 1e-4


def causal(length: int) -> Tensor:
    """A dense mask: Transformers would take positions that go back for packed texts that do not see each other."""
    return torch.ones(length, length, dtype=torch.bool).tril().expand(2, 1, -1, -1)


@torch.no_grad()
def test_positions_follow_crops_beams_and_repeats() -> None:
    model = build("Llama", "rotary key rebuilt")
    cache = model.make_cache()
    through(model, cache, BY_ROW, [12], causal(16))
    cache.crop(-3)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([True, False, False, True]))
    assert cache.positions.last(9, CPU).tolist() == [BY_ROW[1, :9].tolist(), BY_ROW[0, :9].tolist()]
    rows = IDS[[1, 0]]
    expected = model(rows, position_ids=BY_ROW[[1, 0]], attention_mask=causal(16), use_cache=False).logits[:, 9:]
    got = model(rows[:, 9:], position_ids=BY_ROW[[1, 0], 9:], cache=cache, attention_mask=causal(16)[:, :, 9:]).logits
    assert (got - expected).abs().max() <= 1e-4
    assert copy.deepcopy(cache).positions.tokens == 16
    cache.reset()
    assert cache.positions.tokens == 0


@pytest.mark.parametrize("form", ["rotary key rebuilt", "full rope"])
@torch.no_grad()
def test_a_cache_without_positions_refuses_what_it_cannot_know(form: str) -> None:
    model = build("Llama", form)
    for positions in (JUMP, BY_ROW):
        cache = DynamicCache(config=model.config)
        with pytest.raises(InvalidValueError, match=r"position_ids.*make_cache"):
            through(model, cache, positions, [7, 8, 16], causal(16))
    straight = torch.arange(16)[None]
    got = through(model, DynamicCache(config=model.config), straight, [7, 8, 16])
    assert (got - model(IDS, use_cache=False).logits).abs().max() <= 1e-4


@pytest.mark.parametrize("form", ["rotary key rebuilt", "full rope"])
@torch.no_grad()
def test_windowed_layers_over_such_a_cache_take_padding_and_refuse_the_rest(form: str) -> None:
    """The window is 9: after 16 tokens, the padding is out of every window and no layer's mask tells of it."""
    model = build("Mistral", form)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :4] = 0  # padded on the left
    mask[1, 12:14] = 0  # and in between
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    ids = token_ids(2, 20)
    expected = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    cache = DynamicCache(config=model.config)
    for start, stop in zip([0, 14, 15, 16, 17, 18], [14, 15, 16, 17, 18, 20], strict=True):
        new = slice(start, stop)
        keywords = {"position_ids": positions[:, new], "attention_mask": mask[:, :stop]}
        got = model(ids[:, new], cache=cache, **keywords).logits
        real = mask[:, new].bool()
        assert (got - expected[:, new])[real].abs().max() <= 1e-4
    for wrong in (positions[:, -1:] - 1, positions[:, -1:] + 2):
        with pytest.raises(InvalidValueError, match=r"position_ids.*make_cache"):
            model(ids[:, -1:], cache=cache, position_ids=wrong + 1, attention_mask=torch.ones(2, 21))


@pytest.mark.parametrize("form", ["rotary key rebuilt", "full rope"])
@torch.no_grad()
def test_a_tree_of_drafts_is_verified_at_its_own_positions(form: str) -> None:
    """Two drafts of two tokens follow one prompt: they share positions and do not see each other."""
    model = build("Llama", form)
    prompt, one, two = IDS[:1, :8], IDS[:1, 8:10], IDS[:1, 10:12]
    cache = model.make_cache()
    model(prompt, cache=cache)
    mask = torch.ones(4, 12, dtype=torch.bool).tril(8)
    mask[2:, 8:10] = False
    positions = torch.tensor([[8, 9, 8, 9]])
    drafts = torch.cat([one, two], dim=1)
    got = model(drafts, cache=cache, position_ids=positions, attention_mask=mask[None, None]).logits
    for draft, logits in zip((one, two), got.split(2, dim=1), strict=True):
        expected = model(torch.cat([prompt, draft], dim=1), use_cache=False).logits[:, 8:]
        assert (logits - expected).abs().max() <= 1e-4


ROPES = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [3.0, 2.5, 2.0, 1.5, 1.5, 1.2, 1.1, 1.0],
        "factor": 2.0,
        "original_max_position_embeddings": 20,
    },
}


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("absorbing", [True, False])
@torch.no_grad()
def test_frequencies_that_depend_on_the_length_are_those_of_the_pass(
    rope: str, absorbing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token turns as in one pass of the source, also where a decode crosses the original length."""
    monkeypatch.setattr("optimum_mla.cache.layer.block_tokens", lambda width: 8)
    source = source_model("llama", rope_parameters=ROPES[rope], max_position_embeddings=20)
    model = GQA2MLA()(source, copy=True)
    for layer in model.model.layers:
        layer.self_attn._absorbing_saves = lambda queries, tokens: absorbing
    ids = token_ids(1, 28)
    cache = model.make_cache()
    model(ids[:, :15], cache=cache)
    for stop in range(16, 29):
        got = model(ids[:, stop - 1 : stop], cache=cache).logits[:, -1]
        expected = source(ids[:, :stop], use_cache=False).logits[:, -1]
        if rope == "longrope" or stop <= 20:  # the hidden states of earlier tokens keep what they were computed with
            allowed = 1e-4 if stop <= 20 else 1.0
            assert (got - expected).abs().max() <= allowed, stop
    whole = model(ids, use_cache=False).logits
    assert (whole - source(ids, use_cache=False).logits).abs().max() <= 1e-4


@given(
    pieces=st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=4), min_size=1, max_size=6),
    cut=st.integers(0, 20),
)
def test_positions_come_back_as_they_were_given(pieces: list[list[int]], cut: int) -> None:
    positions, said = CachedPositions(), []
    for piece in pieces:
        for _ in range(2):  # two layers
            positions.note(len(said), len(piece), torch.tensor([piece]))
        said += piece
    assert positions.last(len(said), CPU).tolist() == [said]
    assert positions.consecutive == (said == list(range(said[0], said[0] + len(said))))
    positions.cut(cut)
    kept = said[:cut]
    assert positions.last(len(kept), CPU).tolist() == [kept]


def test_a_batch_a_dtype_or_heads_that_differ_are_refused() -> None:
    for form in FORMS:
        model = build("Llama", form)
        cache = model.make_cache()
        model(IDS[:1, :5], cache=cache)
        with pytest.raises(InvalidValueError, match=r"2 rows .*1 rows.*batch_repeat_interleave"):
            model(IDS[:, 5:6], cache=cache)
        foreign = DynamicCache(config=model.config)
        model(IDS[:1, :5], cache=foreign)
        if form != "hybrid":
            with pytest.raises(InvalidValueError, match=r"1 rows, 1 heads.*make_cache"):
                model(IDS[:, 5:6], cache=foreign)
        source = source_model("llama")
        held = DynamicCache(config=source.config)
        source(IDS[:, :5], **cache_argument(source, held))
        with pytest.raises(InvalidValueError, match=r"keys of 2 rows, 2 heads, 16 numbers.*make_cache"):
            model(IDS[:, 5:6], cache=held)
    with pytest.raises(InvalidValueError, match="tuple"):
        model(IDS, cache=((), ()))
