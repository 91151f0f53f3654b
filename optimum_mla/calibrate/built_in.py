"""The text that comes with the package, for conversions whose user gives none."""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optimum_mla.calibrate.text import text_beginning
from optimum_mla.core.errors import CalibrationDataError

BUILT_IN_TEXT = Path(__file__).parent / "general.jsonl.xz"
"""A file of passages, each with its source: books, thirty languages, program code, questions with answers, articles.

All of it is in the public domain or was written for this project: `SOURCES.md` lists it. It was made by
`benchmarks/calibration_text.py`.
"""
QUESTION, ANSWER = "Question: ", "\nAnswer: "
"""The words before a question and before its answer in the passages that hold questions."""
GO_ON = "Go on with this text:\n\n"
"""The user's words in the chats that are made of plain passages."""


def built_in_windows(tokenizer: Any, length: int, samples: int) -> Tensor:
    """Return windows of token ids of the built-in text, [N, L].

    If the tokenizer has a chat template, all questions and every second one of the other passages are rendered as chats
    by it, so that the model is also calibrated on the tokens and the form that it meets in use. Windows begin with a
    passage or inside of one, in turn, and with what the tokenizer puts in front of every text.

    Args:
        tokenizer: A Transformers tokenizer.
        length: Tokens per window.
        samples: Largest number of windows; there are fewer if the text ends before.

    Raises:
        CalibrationDataError: The text is shorter than one window.
    """
    beginning = text_beginning(tokenizer)
    windows: list[list[int]] = []
    held: list[int] = []
    inside = False  # whether `held` begins inside of a passage
    for text in _documents(tokenizer):
        held = held + tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        while len(windows) < samples:
            whole = held if held[: len(beginning)] == beginning else beginning + held
            if len(whole) < length:
                break
            windows.append(whole[:length])
            # What a second window leaves of a passage is dropped, so that the next one begins with a passage.
            inside = not inside
            held = whole[length:] if inside else []
        if len(windows) == samples:
            break
    if not windows:
        raise CalibrationDataError(
            f"the built-in text is shorter than one window of {length} tokens. Give shorter windows or your own text."
        )
    return torch.tensor(windows, dtype=torch.long)


def _documents(tokenizer: Any) -> Iterator[str]:
    """Yield the passages, as plain text or as chats that the tokenizer's template has rendered."""
    with lzma.open(BUILT_IN_TEXT, "rt", encoding="utf-8") as handle:
        passages = [json.loads(line)["text"] for line in handle]
    chats = _has_template(tokenizer)
    for number, text in enumerate(passages):
        if chats and text.startswith(QUESTION):
            for part in text.strip().split(f"\n\n{QUESTION}"):
                question, _, answer = part.removeprefix(QUESTION).partition(ANSWER)
                yield _rendered(tokenizer, question, answer)
        elif chats and number % 2:
            third = text.find(" ", len(text) // 3) + 1
            yield _rendered(tokenizer, GO_ON + text[:third].strip(), text[third:].strip())
        else:
            yield text


def _has_template(tokenizer: Any) -> bool:
    """Return whether the tokenizer has a chat template that renders a question with its answer."""
    if getattr(tokenizer, "chat_template", None) is None:
        return False
    try:
        return bool(_rendered(tokenizer, "Why?", "Because."))
    except Exception:  # Templates are programs, which raise anything.
        return False


def _rendered(tokenizer: Any, question: str, answer: str) -> str:
    """Return a chat of one question and one answer in the tokenizer's template."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return tokenizer.apply_chat_template(messages, tokenize=False)
