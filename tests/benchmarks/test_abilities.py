"""The tasks that ask what perplexity does not see, and the reader that answers them from a cache."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

from benchmarks.real_abilities import CachedReader
from benchmarks.result import ROOT
from optimum_mla.measure.tasks import evaluate_tasks, task_manager

FOLDER = ROOT / "benchmarks" / "abilities"
REFERENCE = ROOT / "benchmarks" / "reference_model"


@pytest.fixture(scope="module")
def documents() -> Any:
    """The module with the documents, which lm_eval imports from its own folder."""
    sys.path.insert(0, str(FOLDER))
    try:
        import documents

        yield documents
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32).eval()


def test_a_needle_lies_where_it_says_and_nowhere_else(documents: Any) -> None:
    found = documents.needle(tokens=1000, documents=10)["test"]
    assert found.to_list() == documents.needle(tokens=1000, documents=10)["test"].to_list()
    assert [row["depth"] for row in found] == [0.0, 0.25, 0.5, 0.75, 1.0] * 2
    for row in found:
        text, _, question = row["text"].rpartition("\n\nQuestion: ")
        assert text.count(row["answer"]) == 1
        assert row["answer"] not in question
        assert text.index(row["answer"]) / len(text) == pytest.approx(row["depth"], abs=0.08)
        assert 3500 < len(text) < 4400


def test_every_number_of_a_text_is_asked_for(documents: Any) -> None:
    found = documents.needles(tokens=1000, documents=16)["test"].to_list()
    assert len({row["answer"] for row in found}) == 16
    for first in (0, 8):
        texts = {row["text"].rpartition("\n\nQuestion: ")[0] for row in found[first : first + 8]}
        assert len(texts) == 1  # so that the reader reads it once
        assert all(row["answer"] in next(iter(texts)) for row in found[first : first + 8])
    listed = documents.lookup(pairs=50, documents=8)["test"].to_list()
    for row in listed:
        *lines, asked = row["text"].splitlines()
        assert f"{asked} {row['answer']}" in lines
        assert len([line for line in lines if ": " in line]) == 50


def test_last_words_are_in_the_passage_but_do_not_end_it(documents: Any) -> None:
    found = documents.last_word(documents=40)["test"]
    assert len(set(found["text"])) == 40
    for row in found:
        assert row["answer"] in row["text"]
        assert not row["text"].endswith(row["answer"])


def test_scores(documents: Any) -> None:
    number = {"answer": "12345"}
    assert documents.exact(number, [" 12345. And"]) == {"exact_match": 1.0}
    assert documents.exact(number, [" 12344"]) == {"exact_match": 0.0}
    words = {"answer": "one two three four"}
    assert documents.same_words(words, ["one two three four"]) == {"exact_match": 1.0, "same_words": 1.0}
    assert documents.same_words(words, ["one two 3 four five"]) == {"exact_match": 0.0, "same_words": 0.4}
    assert documents.same_words(words, [""]) == {"exact_match": 0.0, "same_words": 0.0}


@pytest.mark.parametrize("unread", [3, 8, 1000])
def test_the_reader_answers_as_the_model_does(model: PreTrainedModel, unread: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    made: list[DynamicCache] = []

    def make_cache() -> DynamicCache:
        made.append(DynamicCache(config=model.config))
        return made[-1]

    reader = CachedReader(model, tokenizer, make_cache, unread)
    text = "Once upon a time there was a king who had three daughters, and the youngest of them was so"
    prompts = [text + end for end in (" fair", " very fair that", " fair and good that even the sun")]
    options = {"until": [], "max_gen_toks": 8}
    answers = reader.generate_until([SimpleNamespace(args=(prompt, options)) for prompt in prompts])
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        whole = model.generate(ids, max_new_tokens=8, do_sample=False)
        assert answer == tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
    assert len(made) == 1  # The first prompt is the shortest, so what was read of it serves the others.

    (likely, greedy), *_ = reader.loglikelihood([SimpleNamespace(args=(text, " beautiful"))], disable_tqdm=True)
    ids = tokenizer(text + " beautiful", return_tensors="pt").input_ids
    start = len(tokenizer(text).input_ids)
    with torch.no_grad():
        logits = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
    wanted = ids[0, start:]
    assert likely == pytest.approx(float(logits.gather(1, wanted[:, None]).sum()), abs=1e-4)
    assert greedy == bool((logits.argmax(-1) == wanted).all())


def test_the_tasks_run_offline(model: PreTrainedModel) -> None:
    names = ["lookup_50", "copying", "last_word", "agreement"]
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    rows = evaluate_tasks(model, tokenizer, task_manager(names, str(FOLDER)), names, 1, 2)
    assert {(task, metric) for task, metric, *_ in rows} == {
        *((name, "exact_match") for name in ("lookup_50", "copying", "agreement")),
        *((name, "same_words") for name in ("copying", "agreement")),
        *(("last_word", metric) for metric in ("acc", "perplexity")),
    }
    assert all(value >= 0 and error is not None for *_, value, error in rows)
