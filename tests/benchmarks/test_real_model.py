"""Conversions of a real model, whose 30 layers and attention sinks no model of the other tests has."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.real_model import ANSWER, OUTPUT, QUESTION, ask
from benchmarks.result import ROOT
from optimum_mla import GQA2MLA, MHA2MLA, XEcoMLA
from optimum_mla.measure.verify import verify

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (OUTPUT / "config.json").exists(), reason="`make real-model` fetches it"),
]
TEXT = ROOT / "benchmarks" / "reference_model" / "evaluation.txt"


@pytest.fixture(scope="module")
def source() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(OUTPUT)


@pytest.fixture(scope="module")
def tokenizer() -> AutoTokenizer:
    return AutoTokenizer.from_pretrained(OUTPUT)


@torch.no_grad()
def test_at_full_rank_it_is_the_source(source: PreTrainedModel, tokenizer: AutoTokenizer) -> None:
    ids = tokenizer(TEXT.read_text(encoding="utf-8")[:4000], return_tensors="pt").input_ids[:, :512]
    converted = GQA2MLA()(source, copy=True)
    expected, got = source(ids).logits, converted(ids).logits
    assert ids.shape[1] == 512
    assert (got - expected).norm() <= 1e-4 * expected.norm()
    assert ANSWER in ask(converted, tokenizer, QUESTION)
    assert ask(converted, tokenizer, QUESTION) == ask(source, tokenizer, QUESTION)


@pytest.mark.parametrize(
    "transformation",
    [
        GQA2MLA(kv_cache_ratio=0.5),
        MHA2MLA(kv_cache_ratio=0.5),
        XEcoMLA(kv_cache_ratio=0.5, rope_selection="last"),
    ],
    ids=["gqa2mla", "mha2mla", "x-ecomla"],
)
def test_its_cache_and_its_steps_are_verified(source: PreTrainedModel, transformation: GQA2MLA) -> None:
    converted = transformation(copy.deepcopy(source))
    result = verify(converted)
    assert result.cache_bytes_live == result.cache_bytes_predicted
    assert converted.geometry.cache_ratio == pytest.approx(0.5, abs=0.02)
