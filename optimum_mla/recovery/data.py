"""Training data: documents packed into rows of equal length, and pairs for DPO."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor

from optimum_mla.calibrate.text import cut_windows, token_documents
from optimum_mla.core.errors import CalibrationDataError, InvalidValueError
from optimum_mla.core.progress import progress
from optimum_mla.io.documents import read_rows

FIELD = "train-data"
Source = str | Path | Iterable[int]
ROWS_PER_HELD_BACK = 20
"""Rows of training data, of which one is held back."""
MOST_HELD_BACK = 32
"""Largest number of rows that are held back; of a stream it is the number, because its length is not known."""


def packed_rows(tokenizer: Any, source: Source, length: int, chats: bool = False) -> Iterator[list[int]]:
    """Yield documents one after the other, cut into rows of `length` tokens.

    Every document and every row begins with what the tokenizer puts in front of a text, such as BOS, and every document
    ends with the end-of-text token. What is left at the end, fewer tokens than a row, is dropped. Token ids that are
    given stay as they are. The arguments are those of `pack`.
    """
    beginning, documents = token_documents(tokenizer, source, chats)
    end = getattr(tokenizer, "eos_token_id", None) if isinstance(source, str | Path) else None

    def pieces() -> Iterator[list[int]]:
        for document in documents:
            if not chats:
                yield beginning
            yield from document
            if end is not None:
                yield [end]

    yield from cut_windows(pieces(), length, beginning)


def pack(tokenizer: Any, source: Source, length: int, tokens: int | None = None, chats: bool = False) -> Dataset:
    """Return the packed rows of a whole text, whose `input_ids` and `labels` are the same tensors [length].

    Args:
        tokenizer: A Transformers tokenizer; not used for token ids.
        source: What `optimum_mla.io.documents.read_documents` reads, or token ids.
        length: Tokens per row.
        tokens: Read no more than so many tokens; None reads everything.
        chats: `source` is what `optimum_mla.io.documents.read_rows` reads, whose `messages` the tokenizer's chat
            template renders.

    Raises:
        CalibrationDataError: The text is missing, malformed or shorter than one row.
        InvalidValueError: `tokens` are fewer than one row.
    """
    if tokens is not None and tokens < length:
        raise InvalidValueError("train_tokens", tokens, f"integers from {length}, the tokens of one row")
    wanted = None if tokens is None else tokens // length
    reading = progress(islice(packed_rows(tokenizer, source, length, chats), wanted), "reading the training text, rows")
    ids = [torch.tensor(row).numpy() for row in reading]
    _check_rows(ids, source, length)
    return Dataset.from_dict({"input_ids": ids, "labels": ids}).with_format("torch")


def stream(tokenizer: Any, source: Source, length: int, chats: bool = False) -> IterableDataset:
    """Return the rows of `pack`, which are read and packed while training goes on; nothing is kept.

    They are one shard: a `DataLoader` reads them in one of its workers, and Accelerate shares them between processes.

    Args:
        tokenizer: A Transformers tokenizer; not used for token ids.
        source: Text as for `pack`, or token ids that can be read more than once.
        length: Tokens per row.
        chats: Read `source` as for `pack`.

    Raises:
        CalibrationDataError: The first row cannot be read, for the reasons that `pack` has.
    """
    if not isinstance(source, str | Path) and iter(source) is source:
        raise CalibrationDataError(
            f"{FIELD}: token ids to be streamed were given as an iterator, which can be read only once. "
            "Give a list or another object that can be read again."
        )
    rows = IterableDataset.from_generator(partial(_examples, tokenizer, source, length, chats)).with_format("torch")
    _check_rows(list(rows.take(1)), source, length)
    return rows


def _examples(tokenizer: Any, source: Source, length: int, chats: bool) -> Iterator[dict[str, list[int]]]:
    for row in packed_rows(tokenizer, source, length, chats):
        yield {"input_ids": row, "labels": row}


def _check_rows(rows: list[Any], source: Source, length: int) -> None:
    if not rows:
        raise CalibrationDataError(
            f"{FIELD}: {source} holds fewer tokens than one row of {length}. Give a longer text or shorter rows."
        )


def describe(rows: Dataset | IterableDataset, length: int) -> dict[str, Any]:
    """Return what the report says about rows of `length` tokens; those of a stream are neither counted nor hashed."""
    if isinstance(rows, IterableDataset):
        return {"rows": None, "tokens_per_row": length, "sha256": None}
    digest = hashlib.sha256(rows[:]["input_ids"].numpy().tobytes()).hexdigest()
    return {"rows": len(rows), "tokens_per_row": length, "sha256": digest}


def hold_back(rows: Dataset | IterableDataset) -> tuple[Dataset | IterableDataset, Tensor | None]:
    """Return the rows to train on, and token ids [N, L] of rows that are held back to measure the training on.

    They are evenly spaced, and the first ones of a stream. Where there is too little text nothing is held back.
    """
    if isinstance(rows, IterableDataset):
        # With several workers, `skip` of datasets 4 leaves out too few rows.
        rest = rows.filter(_trains, with_indices=True)
        if not list(rest.take(1)):
            return rows, None
        return rest, torch.stack([row["input_ids"] for row in rows.take(MOST_HELD_BACK)])
    count = min(MOST_HELD_BACK, len(rows) // ROWS_PER_HELD_BACK)
    if not count:
        return rows, None
    held = torch.linspace(0, len(rows), count + 2)[1:-1].long().tolist()
    return rows.select(sorted({*range(len(rows))} - {*held})), rows[held]["input_ids"]


def _trains(row: dict[str, Tensor], number: int) -> bool:
    return number >= MOST_HELD_BACK


def preferences(source: str | Path) -> Dataset:
    """Return pairs for DPO, rows of `prompt`, `chosen` and `rejected`.

    Args:
        source: What `optimum_mla.io.documents.read_rows` reads, with these columns as strings.

    Raises:
        CalibrationDataError: A column is missing (named with its row), or there is no row.
    """
    columns: dict[str, type] = {"prompt": str, "chosen": str, "rejected": str}
    rows = [{name: row[name] for name in columns} for row in read_rows(source, columns)]
    if not rows:
        raise CalibrationDataError(f"{FIELD}: {source} holds no rows. DPO needs prompt, chosen and rejected in each.")
    return Dataset.from_list(rows)
