"""Text for calibration and evaluation, cut into windows of token ids."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from optimum_mla.core.errors import CalibrationDataError, InvalidValueError
from optimum_mla.io.documents import data_error, read_documents, read_rows

DEFAULT_WINDOW = 512
"""Tokens of a window where the user gives no length and the model can take so many."""
IDS_PER_PIECE = 16_384
"""Token ids that are taken at once from an iterable of them."""
PIECE_CHARACTERS = 65_536
"""A text is tokenized in pieces of at most so many characters."""
CUTS = tuple(re.compile(f".*[^\\W_](?={after})", re.DOTALL) for after in (r" [^\W_]", r"\s", r"\W"))
"""Expressions that match a text up to the last good place for a cut, the best kind of place first.

Tokenizers split a text between a word and white space before they look for tokens, so a cut there changes no token.
One space with a word after it is best, because a tokenizer that puts a space in front of every text restores it. In
a script without spaces a cut after a word has to do.
"""


def context_limit(config: PreTrainedConfig) -> int | None:
    """Return the largest number of tokens that a model's config allows, or None if the config does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def window_length(config: PreTrainedConfig, length: int | None, field: str) -> int:
    """Return the tokens of a window: the given number, or `DEFAULT_WINDOW` as far as the model's context allows.

    Args:
        config: The model's config.
        length: What the user gave, or None.
        field: Name of the option that gave it, for the error message.

    Raises:
        InvalidValueError: The model does not take so many tokens, or there are fewer than 2.
    """
    longest = context_limit(config) or DEFAULT_WINDOW
    length = min(DEFAULT_WINDOW, longest) if length is None else length
    if not 2 <= length <= longest:
        raise InvalidValueError(field, length, f"2 to {longest} for this model")
    return length


def token_windows(
    tokenizer: Any,
    source: str | Path | Iterable[int],
    length: int,
    samples: int | None = None,
    field: str = "calibration-data",
    chats: bool = False,
    stride: int | None = None,
) -> Tensor:
    """Return windows of token ids, [N, length], from the beginning of the text.

    Every window begins with what the tokenizer puts in front of a text, such as a BOS token, which counts towards
    `length`, and goes on with the text where the window before it ended. Token ids that are given stay as they are.
    No more is read and tokenized than the windows need.

    Args:
        tokenizer: A Transformers tokenizer; not used when `source` is an iterable of token ids.
        source: What `optimum_mla.io.documents.read_documents` reads, or token ids.
        length: Tokens per window.
        samples: At most so many windows are returned; None takes the whole text.
        field: The name of the option that gave `source`, for the error message.
        chats: `source` is what `optimum_mla.io.documents.read_rows` reads, whose `messages` the tokenizer's chat
            template renders.
        stride: Let windows overlap: each starts so many tokens of text after the one before it.

    Raises:
        CalibrationDataError: The text is missing, malformed or shorter than one window, or a chat does not render.
    """
    beginning, documents = token_documents(tokenizer, source, chats)
    read = 0

    def counted() -> Iterator[list[int]]:
        nonlocal read
        for ids in chain.from_iterable(documents):
            read += len(ids)
            yield ids

    windows = list(islice(cut_windows(counted(), length, beginning, stride), samples))
    if not windows:
        raise CalibrationDataError(
            f"{field}: {source} holds {read} tokens, fewer than one sample of {length}. "
            "Give a longer text or shorter samples."
        )
    return torch.tensor(windows, dtype=torch.long)


def cut_windows(
    pieces: Iterable[list[int]], length: int, beginning: list[int], stride: int | None = None
) -> Iterator[list[int]]:
    """Yield windows of `length` token ids; what is left at the end is too short for one and is dropped.

    Args:
        pieces: Consecutive token ids.
        length: Tokens per window.
        beginning: Put in front of each window, unless the window's tokens begin so already or it has no room for more.
        stride: Tokens from one window's first token to the next one's; None lets windows follow each other.
    """
    if len(beginning) >= length:
        beginning = []
    held: list[int] = []
    start = 0
    for piece in pieces:
        held += piece
        while True:
            begins = held[start : start + len(beginning)] == beginning
            end = start + length - (0 if begins else len(beginning))
            if end > len(held):
                break
            yield held[start:end] if begins else beginning + held[start:end]
            start = end if stride is None else start + stride
        # A stride beyond the window can lead past what is held; the next pieces then begin with tokens to skip.
        held, start = held[start:], max(0, start - len(held))


def token_documents(
    tokenizer: Any, source: str | Path | Iterable[int], chats: bool = False
) -> tuple[list[int], Iterator[Iterator[list[int]]]]:
    """Return what every window begins with, and the documents (or chats), each as pieces of token ids.

    The documents do not hold what windows begin with, unless a chat template writes it. The arguments are those of
    `token_windows`.
    """
    if not isinstance(source, str | Path):
        if chats:
            raise CalibrationDataError("chat-template: got token ids, allowed: a file, folder or dataset of chats.")
        return [], iter([_given_ids(source)])
    beginning = text_beginning(tokenizer)
    if not chats:
        return beginning, (_tokens_of_document(tokenizer, document) for document in read_documents(source))
    rendered = _rendered_chats(tokenizer, source)
    first = next(rendered, [])
    # A chat begins as its template begins it.
    return beginning if first[: len(beginning)] == beginning else [], (iter([ids]) for ids in chain([first], rendered))


def text_beginning(tokenizer: Any) -> list[int]:
    """Return the token ids that the tokenizer puts in front of every text, such as BOS; many tokenizers add none."""
    plain, whole = _ids(tokenizer, "a"), tokenizer("a")["input_ids"]
    places = (place for place in range(len(whole)) if whole[place : place + len(plain)] == plain)
    return list(whole[: next(places, 0)])


def _ids(tokenizer: Any, text: str) -> list[int]:
    # verbose=False: a text is longer than the model's context, and is cut into windows on purpose.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _given_ids(source: Iterable[int]) -> Iterator[list[int]]:
    ids = iter(source)
    try:
        while piece := [operator.index(token) for token in islice(ids, IDS_PER_PIECE)]:
            yield piece
    except TypeError as error:
        raise data_error("text: token ids have to be integers", error) from error


def _tokens_of_document(tokenizer: Any, blocks: Iterable[str]) -> Iterator[list[int]]:
    # A tokenizer that puts a space in front of every text would double the one that a piece begins with.
    spaced: bool | None = None
    for number, piece in enumerate(text_pieces(blocks)):
        if number and spaced is None:
            spaced = _ids(tokenizer, "a a") == 2 * _ids(tokenizer, "a")
        yield _ids(tokenizer, piece.removeprefix(" ") if spaced else piece)


def text_pieces(blocks: Iterable[str]) -> Iterator[str]:
    """Yield a text in pieces of at most `PIECE_CHARACTERS` characters, cut where no token spans the cut.

    The pieces are the same however the text comes in blocks, and no more blocks are read than they need.
    """
    rest = ""
    for block in blocks:
        rest += block
        while len(rest) >= PIECE_CHARACTERS:
            found = (cut.match(rest, PIECE_CHARACTERS // 2, PIECE_CHARACTERS) for cut in CUTS)
            end = next((match.end() for match in found if match), PIECE_CHARACTERS)
            yield rest[:end]
            rest = rest[end:]
    if rest:
        yield rest


def _rendered_chats(tokenizer: Any, source: str | Path) -> Iterator[list[int]]:
    if getattr(tokenizer, "chat_template", None) is None:
        raise CalibrationDataError("chat-template: the model's tokenizer has none. Give plain text instead.")
    for row in read_rows(source, {"messages": list}):
        try:
            text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
            ids = _ids(tokenizer, text)
        except Exception as error:  # Templates are programs, which raise anything.
            raise data_error(f"chat-template: a chat of {source} does not render", error) from error
        yield ids
