"""The source's own answers to built-in prompts, and how far another model's predictions on them are."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from optimum_mla import GQA2MLA
from optimum_mla.measure.answers import BEGINNINGS, NEW_TOKENS, QUESTIONS, answers, measure_movement, prompts, text_of

REFERENCE = Path(__file__).resolve().parents[2] / "benchmarks" / "reference_model"
TEMPLATE = "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}!{% endif %}"
TOKENIZER = AutoTokenizer.from_pretrained(REFERENCE)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32).train()


@torch.no_grad()
def greedy(model: PreTrainedModel, ids: torch.Tensor, ends: list[int]) -> list[int]:
    """The specification: one token after the other, without a cache and without a batch."""
    said: list[int] = []
    while len(said) < NEW_TOKENS and not (said and said[-1] in ends):
        logits = model(torch.cat([ids, torch.tensor(said, dtype=torch.long)])[None], use_cache=False).logits
        said.append(int(logits[0, -1].argmax()))
    return said


def test_answers_are_the_greedy_continuations_and_end_where_the_model_ends(model: PreTrainedModel) -> None:
    asked = prompts(TOKENIZER, len(TOKENIZER))
    assert [text for text, _ in asked] == list(BEGINNINGS)
    model.eval()
    expected = [greedy(model, ids, []) for _, ids in asked]
    model.train()
    said = answers(model, asked)
    assert model.training
    assert [answer.said.tolist() for answer in said] == expected
    assert text_of(said[0], TOKENIZER) == TOKENIZER.decode(expected[0])
    ending = copy.deepcopy(model)
    ending.generation_config.eos_token_id = [expected[0][0], expected[1][5]]
    ends = ending.generation_config.eos_token_id
    cut = answers(ending, asked)
    assert cut[0].said.tolist() == expected[0][:1]
    assert len(cut[1].said) <= 6
    assert cut[1].said[-1] in ends
    assert answers(model, []) == []


def test_questions_stand_in_the_chat_template() -> None:
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = TEMPLATE
    asked = prompts(tokenizer, len(tokenizer))
    assert [text for text, _ in asked] == list(QUESTIONS)
    assert tokenizer.decode(asked[0][1]) == f"[{QUESTIONS[0]}]!"


def test_a_template_that_does_not_render_and_tokens_without_embeddings_stop_nothing() -> None:
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = "{{ raise_exception('system messages only') }}"
    assert [text for text, _ in prompts(tokenizer, len(tokenizer))] == list(BEGINNINGS)
    largest = [int(ids.max()) for _, ids in prompts(TOKENIZER, len(TOKENIZER))]
    kept = [text for text, _ in prompts(TOKENIZER, max(largest))]
    assert kept == [text for text, most in zip(BEGINNINGS, largest, strict=True) if most < max(largest)]


@torch.no_grad()
def test_movement_is_that_of_the_predictions_of_the_answers_tokens(model: PreTrainedModel) -> None:
    said = answers(model, prompts(TOKENIZER, len(TOKENIZER)))
    model.eval()
    none = measure_movement(model, model, said)
    assert (none.divergence_nats, none.same_guess_percent) == (pytest.approx(0, abs=1e-7), 100.0)
    other = GQA2MLA(kv_cache_ratio=0.5)(copy.deepcopy(model))
    divergence, same, count = 0.0, 0, 0
    for answer in said:
        ids = torch.cat([answer.asked, answer.said])
        expected, found = (one(ids[None]).logits[0].log_softmax(-1) for one in (model, other))
        for place in range(len(answer.asked), len(ids)):
            p, q = expected[place - 1], found[place - 1]
            divergence += float((p.exp() * (p - q)).sum())
            same += int(p.argmax() == q.argmax())
            count += 1
    measured = measure_movement(model, other, said)
    assert measured.tokens == count == none.tokens
    assert measured.divergence_nats == pytest.approx(divergence / count, rel=1e-4)
    assert measured.same_guess_percent == pytest.approx(100 * same / count)
    assert measured.divergence_nats > 0.01
