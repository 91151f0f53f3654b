"""The cache is found by what Transformers annotates, taken by every known name, and never swallowed under another."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Cache, DynamicCache, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaAttention

from optimum_mla import GQA2MLA, LatentCache
from optimum_mla.core.errors import InvalidValueError, UnknownKeywordError, UnsupportedStackError
from optimum_mla.stack import CACHE_ARGUMENT, cache_argument, cache_name, cache_of, cache_position, renamed_cache
from optimum_mla.stack.cache_argument import ACCEPTED_NAMES, OUTDATED_NAMES, cache_parameter
from tests.cases import source_model, token_ids


class Plain(nn.Module):
    def forward(self, hidden: torch.Tensor, held: Cache | None = None, **kwargs: Any) -> None: ...


class AsText(nn.Module):
    def forward(self, hidden: torch.Tensor, kv_store: Cache | None = None, **kwargs: Any) -> None: ...


# All annotations of this file are strings, but Transformers' own are objects.
Plain.forward.__annotations__["held"] = Cache | None


class Nothing(nn.Module):
    def forward(self, hidden: torch.Tensor, cached: bool = False, **kwargs: Any) -> None: ...


def test_a_name_is_read_from_the_annotation() -> None:
    assert cache_parameter(Plain.forward) == ("held", 2)
    assert cache_parameter(AsText.forward) == ("kv_store", 2)
    assert cache_parameter(Nothing.forward) is None
    cache = DynamicCache()
    assert cache_argument(Plain(), cache) == {"held": cache}
    assert cache_argument(AsText(), cache) == {"kv_store": cache}
    assert cache_argument(Nothing(), cache) == {CACHE_ARGUMENT: cache}
    with pytest.raises(UnsupportedStackError, match=r"Nothing\.forward has no argument annotated as a Cache"):
        cache_name(Nothing.forward)


def test_the_installed_release_is_known() -> None:
    assert CACHE_ARGUMENT in ("past_key_values", "cache")
    for source in (LlamaModel, LlamaForCausalLM, LlamaAttention):
        assert cache_name(source.forward) == CACHE_ARGUMENT
        parameters = list(inspect.signature(source.forward).parameters)
        assert parameters[cache_position(source.forward)] == CACHE_ARGUMENT


def test_a_cache_is_renamed_and_two_of_them_are_refused() -> None:
    cache, other = DynamicCache(), DynamicCache()
    for name in ACCEPTED_NAMES:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert renamed_cache({"use_cache": True, name: cache}, "kv", "Model") == {"use_cache": True, "kv": cache}
        assert [warning.category for warning in caught] == [FutureWarning] * (name in OUTDATED_NAMES)
    both = dict.fromkeys(ACCEPTED_NAMES, cache)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert renamed_cache(both, "kv", "Model") == {"kv": cache}
        assert renamed_cache({"past_key_values": None, "cache": cache}, "kv", "Model") == {"kv": cache}
        with pytest.raises(InvalidValueError, match="past_key_values and cache"):
            renamed_cache({"past_key_values": other, "cache": cache}, "kv", "Model")
    assert renamed_cache({"use_cache": True}, "kv", "Model") == {"use_cache": True}


@pytest.fixture(scope="module")
def converted() -> Any:
    return GQA2MLA()(source_model("llama"))


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_models_and_attentions_take_a_cache_by_either_name(converted: Any, name: str) -> None:
    ids = token_ids(2, 12)
    preferred = name == CACHE_ARGUMENT
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error" if preferred else "ignore")
        expected = converted(ids, use_cache=False).logits
        for model in (converted, converted.model):
            cache = converted.make_cache()
            model(ids[:, :7], **{name: cache})
            assert cache.get_seq_length() == 7
            got = model(ids[:, 7:], **{name: cache})
            assert cache_of(got) is cache
            if model is converted:
                assert (got.logits - expected[:, 7:]).abs().max() <= 1e-4
        given_by_place = converted.model(ids, None, None, cache := converted.make_cache())
        assert cache_of(given_by_place) is cache
        attention, states = converted.model.layers[0].self_attn, torch.randn(1, 3, 64)
        table = converted.model.rotary_emb(states, torch.arange(3)[None])
        cache = converted.make_cache()
        attention(states, table, **{name: cache})
        assert cache.get_seq_length() == 3


def test_a_keyword_that_nobody_knows_is_an_error(converted: Any) -> None:
    ids, cache = token_ids(1, 4), converted.make_cache()
    states = torch.randn(1, 3, 64)
    table = converted.model.rotary_emb(states, torch.arange(3)[None])
    attention = converted.model.layers[0].self_attn
    for name in ("kv_store", "past_key_value", "cache_position"):
        for call in (
            lambda: converted(ids, **{name: cache}),  # noqa: B023
            lambda: converted.model(ids, **{name: cache}),  # noqa: B023
            lambda: attention(states, table, **{name: cache}),  # noqa: B023
        ):
            with pytest.raises(UnknownKeywordError, match=rf"got the keyword {name},"):
                call()
    assert cache.get_seq_length() == 0


def test_keywords_of_the_attention_interface_and_of_losses_pass(converted: Any) -> None:
    ids = token_ids(2, 6)
    plain = converted(ids, labels=ids)
    got = converted(
        ids,
        labels=ids,
        num_items_in_batch=torch.tensor(10),
        output_hidden_states=True,
        return_dict=True,
        is_causal=True,
    )
    assert (got.logits - plain.logits).abs().max() == 0
    assert len(got.hidden_states) == 4
    assert abs(got.loss.item() - plain.loss.item()) < 1e-5  # 10 labels are predicted


def test_the_forward_keeps_the_sources_signature(converted: Any) -> None:
    assert inspect.signature(type(converted.model).forward) == inspect.signature(LlamaModel.forward)
    assert inspect.signature(type(converted).forward) == inspect.signature(LlamaForCausalLM.forward)
    embedded = converted.get_input_embeddings()(token_ids(1, 5))
    with torch.no_grad():
        assert torch.equal(converted(inputs_embeds=embedded).logits, converted(token_ids(1, 5)).logits)


def test_generation_fills_the_cache_that_it_makes(converted: Any) -> None:
    ids = token_ids(2, 6)
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    generated = converted.generate(ids, **options)
    cache = cache_of(generated)
    assert type(cache) is LatentCache
    assert cache.get_seq_length() == 10
    assert torch.equal(generated.sequences, converted.generate(ids, use_cache=False, **options).sequences)
