"""No field of a model's own generation config ends a probe, or moves what is chosen in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig

from optimum_mla import GQA2MLA, QuantizeLatentCache
from optimum_mla.measure import verify
from optimum_mla.measure.answers import NEW_TOKENS as ANSWER_TOKENS
from optimum_mla.measure.answers import answers
from optimum_mla.measure.greedy import greedy
from optimum_mla.measure.verify import NEW_TOKENS, PROBE_ROWS
from tests.cases import SIZES, source_model, token_ids
from tests.measure.test_answers import REFERENCE

pytestmark = pytest.mark.compat

EVERY = list(range(SIZES["vocab_size"]))
OWN: dict[str, dict[str, Any]] = {
    "a token that ends the text at once": {"eos_token_id": EVERY},
    "a length that is over": {"max_length": 3},
    "a time that is over": {"max_time": 1e-9},
    "a forced last token": {"forced_eos_token_id": 5},
    "stop strings": {"stop_strings": ["a"]},
    "a least length": {"min_new_tokens": 4, "eos_token_id": EVERY[:50]},
    "tokens that are never chosen": {"suppress_tokens": EVERY[:90]},
    "tokens that are not chosen first": {"begin_suppress_tokens": EVERY[:90]},
    "bad words": {"bad_words_ids": [[token] for token in EVERY[:90]]},
    "a repetition penalty": {"repetition_penalty": 50.0},
    "no repeated tokens": {"no_repeat_ngram_size": 1},
    "a bias": {"sequence_bias": [[[7], 100.0]]},
    "guidance": {"guidance_scale": 9.0},
    "a watermark": {"watermarking_config": {"bias": 100.0}},
    "samples": {"do_sample": True, "temperature": 5.0},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "another cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "a prompt in chunks": {"prefill_chunk_size": 4},
}


def likeliest(model: Any, ids: Tensor, count: int) -> Tensor:
    """The prompt and the likeliest tokens after it, by a loop over whole passes."""
    for _ in range(count):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.mark.parametrize("own", OWN)
@torch.no_grad()
def test_the_models_own_generation_config_changes_nothing(own: str) -> None:
    for converted in (False, True):
        model = source_model("llama")
        if converted:
            GQA2MLA(kv_cache_ratio=1.0)(model)
        model.generation_config = config = GenerationConfig(**OWN[own])
        before, ids = config.to_dict(), token_ids()
        expected = likeliest(model, ids, 6)
        for use_cache in (True, False):
            found = greedy(model, ids, 6, use_cache=use_cache)
            assert torch.equal(found.sequences, expected)
            assert torch.equal(torch.stack(found.logits).argmax(-1).T, expected[:, -6:])
        assert verify(model).generated_tokens == PROBE_ROWS * NEW_TOKENS
        assert model.generation_config is config
        assert config.to_dict() == before


def test_coded_caches_pass_where_every_token_ends_the_text() -> None:
    model = QuantizeLatentCache(bits=4, group_size=8)(GQA2MLA(kv_cache_ratio=0.5)(source_model("llama")))
    model.generation_config.eos_token_id = EVERY
    assert verify(model).generated_tokens == PROBE_ROWS * NEW_TOKENS


@torch.no_grad()
def test_an_answer_ends_where_the_text_does_and_for_no_other_reason() -> None:
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    model: Any = type(source_model("llama")).from_pretrained(REFERENCE, dtype=torch.float32).eval()
    ids = tokenizer("The old house", return_tensors="pt")["input_ids"]
    asked = [("The old house", ids[0])]
    new = likeliest(model, ids, ANSWER_TOKENS)[0, ids.shape[1] :].tolist()
    hostile = {"repetition_penalty": 50.0, "stop_strings": ["a"], "max_length": 3, "num_beams": 3}
    model.generation_config = GenerationConfig(**hostile)
    assert answers(model, asked)[0].said.tolist() == new
    for end in ([new[5]], [new[7], new[5]]):
        model.generation_config = GenerationConfig(**hostile, eos_token_id=end)
        until = new[: min(new.index(token) for token in end) + 1]
        assert answers(model, asked)[0].said.tolist() == until
