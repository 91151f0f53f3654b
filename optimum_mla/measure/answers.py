"""How far a conversion moves the predictions of a model on the model's own answers to a few questions.

A perplexity on plain text hardly shows what becomes of answers: one wrong word early on changes all that follow. So the
source answers a few questions first. Then both models read its answers, and their predictions are compared token by
token.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_mla.measure.greedy import greedy
from optimum_mla.measure.quality import Mean, Movement, evaluating, movement

NEW_TOKENS = 32
"""Largest number of tokens in an answer."""
QUESTIONS = (
    "What is the capital of France?",
    "How do you make a cup of tea? Answer in three short steps.",
    "Why is the sky blue?",
    "Translate into Spanish: The train leaves at nine in the morning.",
    "Write a Python function that returns the larger of two numbers.",
    "Name the planets of the solar system in order.",
    "A farmer has 12 sheep and sells 5 of them. How many are left?",
    "Summarize in one sentence: It rained all night, the river rose over its banks, and the old bridge was closed.",
)
"""Prompts for models with a chat template."""
BEGINNINGS = (
    "The old house stood at the end of the road, and",
    "The capital of France is",
    "To make a good cup of tea, you first",
    "Scientists have found that the",
    "def largest(first, second):\n    ",
    "Once upon a time there was a",
    "The most important cause of the war was",
    "One, two, three, four,",
)
"""Prompts for models without one."""


@dataclass(frozen=True)
class Answer:
    """A prompt and the greedy continuation of it by one model.

    Attributes:
        prompt: The prompt, without what a chat template adds.
        asked: Its token ids with what the template adds, [T].
        said: Token ids of the continuation, [S]; the last one may be an end-of-text token.
    """

    prompt: str
    asked: Tensor
    said: Tensor


def prompts(tokenizer: Any, vocabulary: int) -> list[tuple[str, Tensor]]:
    """Return the built-in prompts as text and as token ids [T], in the tokenizer's chat template if it renders them.

    Args:
        tokenizer: The tokenizer.
        vocabulary: Number of tokens of the model's vocabulary. Prompts with further tokens are left out.
    """
    chats = [[{"role": "user", "content": text}] for text in QUESTIONS]
    rendered = []
    if getattr(tokenizer, "chat_template", None) is not None:
        with suppress(Exception):  # A template is a program of the model's author, and may raise anything.
            rendered = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
    if rendered:
        asked = [(text, _ids(tokenizer, chat, False)) for text, chat in zip(QUESTIONS, rendered, strict=True)]
    else:
        asked = [(text, _ids(tokenizer, text, True)) for text in BEGINNINGS]
    return [(text, ids) for text, ids in asked if len(ids) and int(ids.max()) < vocabulary]


def _ids(tokenizer: Any, text: str, special: bool) -> Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=special)["input_ids"], dtype=torch.long)


def answers(model: PreTrainedModel, asked: Sequence[tuple[str, Tensor]]) -> list[Answer]:
    """Return the greedy continuations of prompts, all generated in one batch.

    Args:
        model: A causal language model.
        asked: Prompts as text and as token ids [T]; there may be none.
    """
    if not asked:
        return []
    ends = _ends(model)
    longest = max(len(ids) for _, ids in asked)
    ids = torch.zeros(len(asked), longest, dtype=torch.long, device=model.device)
    mask = torch.zeros_like(ids)
    for row, (_, prompt) in enumerate(asked):
        ids[row, longest - len(prompt) :] = prompt.to(model.device)
        mask[row, longest - len(prompt) :] = 1
    new = greedy(model, ids, NEW_TOKENS, ends or None, mask=mask).sequences[:, longest:].cpu()
    return [Answer(text, prompt, _until(row, ends)) for (text, prompt), row in zip(asked, new, strict=True)]


def _ends(model: PreTrainedModel) -> list[int]:
    """Return the tokens with which a model ends its texts."""
    end = None if model.generation_config is None else model.generation_config.eos_token_id
    return [] if end is None else list(end) if isinstance(end, list | tuple) else [end]


def _until(said: Tensor, ends: list[int]) -> Tensor:
    """Return generated tokens [S] up to and with the first of the tokens that end a text."""
    places = torch.isin(said, torch.tensor(ends, dtype=torch.long)).nonzero().flatten()
    return said[: int(places[0]) + 1] if len(places) else said


def text_of(answer: Answer, tokenizer: Any) -> str:
    """Return what was said as text."""
    return str(tokenizer.decode(answer.said, skip_special_tokens=True))


@torch.no_grad()
def measure_movement(source: PreTrainedModel, model: PreTrainedModel, said: Sequence[Answer]) -> Movement:
    """Return how far a model's predictions are from its source's on the source's answers.

    Args:
        source: The source model.
        model: The converted model.
        said: What `answers` returned for the source.
    """
    apart, same = [], []
    for answer in said:
        ids = torch.cat([answer.asked, answer.said])[None]
        pair = []
        for one in (source, model):
            with evaluating(one):
                logits = one(ids.to(one.device), use_cache=False, logits_to_keep=len(answer.said) + 1).logits
            pair.append(logits[0, :-1].float().log_softmax(-1).to(source.device))
        divergence, agreed = movement(*pair)
        apart.append(divergence)
        same.append(agreed)
    return Movement(Mean.of(apart).value, 100 * Mean.of(same).value, sum(map(len, apart)))
