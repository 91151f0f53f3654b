"""A short continuation by the source model and by the result, so that a user sees what a conversion did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from optimum_mla.measure.greedy import greedy

NEW_TOKENS = 24
QUESTION = "What is the capital of France?"
"""Prompt for models with a chat template."""
BEGINNING = "The old house stood at the end of the road, and"
"""Prompt for models without one."""


@dataclass(frozen=True)
class Sample:
    """Greedy continuations of one prompt.

    Attributes:
        prompt: The prompt, without what a chat template adds.
        source: The source model's continuation.
        result: The converted model's continuation.
    """

    prompt: str
    source: str
    result: str


def sample_prompt(tokenizer: Any) -> tuple[str, Tensor]:
    """Return a prompt as text and as token ids, [1, T], in the chat template of the tokenizer if it has one."""
    if getattr(tokenizer, "chat_template", None) is None:
        return BEGINNING, tokenizer(BEGINNING, return_tensors="pt")["input_ids"]
    messages = [{"role": "user", "content": QUESTION}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return QUESTION, tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]


def continuation(model: PreTrainedModel, tokenizer: Any, ids: Tensor) -> str:
    """Return the greedy continuation of a prompt as text.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        ids: Token ids of the prompt, [1, T].
    """
    ids = ids.to(model.device)
    end = None if model.generation_config is None else model.generation_config.eos_token_id
    new = greedy(model, ids, NEW_TOKENS, end).sequences
    return tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)
