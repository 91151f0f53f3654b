"""Training data: documents packed into rows of equal length."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

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


class PackedRows(Dataset):
    """Rows of token ids [N, L] in memory."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}

    def describe(self) -> dict[str, Any]:
        """Return what the report says about the rows, with the hash of their token ids."""
        digest = hashlib.sha256(self.ids.numpy().tobytes()).hexdigest()
        return {"rows": len(self.ids), "tokens_per_row": self.ids.shape[1], "sha256": digest}


class StreamedRows(IterableDataset):
    """Rows that are read and packed while training goes on; nothing is kept.

    Each worker of a `DataLoader` reads the whole text and yields its own share of the rows, so that every row comes
    once. The shares of several processes are cut by Accelerate.

    Args:
        tokenizer: A Transformers tokenizer.
        source: Text as for `pack`, or token ids that can be read more than once.
        length: Tokens per row.
        chats: Read `source` as for `pack`.
        skipped: Number of rows at the beginning that are left out.
    """

    def __init__(self, tokenizer: Any, source: Source, length: int, chats: bool = False, skipped: int = 0) -> None:
        if not isinstance(source, str | Path) and iter(source) is source:
            raise CalibrationDataError(
                f"{FIELD}: token ids to be streamed were given as an iterator, which can be read only once. "
                "Give a list or another object that can be read again."
            )
        self.tokenizer, self.source, self.length, self.chats = tokenizer, source, length, chats
        self.skipped = skipped

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        rows = packed_rows(self.tokenizer, self.source, self.length, self.chats)
        for row in islice(rows, self.skipped + first, None, step):
            ids = torch.tensor(row)
            yield {"input_ids": ids, "labels": ids}

    def describe(self) -> dict[str, Any]:
        """Return what the report says about the rows: what is streamed is not hashed."""
        return {"rows": None, "tokens_per_row": self.length, "sha256": None}


def packed_rows(tokenizer: Any, source: Source, length: int, chats: bool = False) -> Iterator[list[int]]:
    """Yield documents one after the other, cut into rows of `length` tokens.

    Every document and every row begins with what the tokenizer puts in front of a text, such as BOS, and every document
    ends with the end-of-text token. What is left at the end, fewer tokens than a row, is dropped. Token ids that are
    given stay as they are.
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


def pack(tokenizer: Any, source: Source, length: int, tokens: int | None = None, chats: bool = False) -> PackedRows:
    """Return the packed rows of a whole text.

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
    rows = [torch.tensor(row) for row in reading]
    if not rows:
        raise _too_short(source, length)
    return PackedRows(torch.stack(rows))


def stream(tokenizer: Any, source: Source, length: int, chats: bool = False) -> StreamedRows:
    """Return packed rows as `pack` makes them, which are read while training goes on.

    Raises:
        CalibrationDataError: The first row cannot be read, for the reasons that `pack` has.
    """
    rows = StreamedRows(tokenizer, source, length, chats)
    if next(iter(rows), None) is None:
        raise _too_short(source, length)
    return rows


def _too_short(source: Source, length: int) -> CalibrationDataError:
    return CalibrationDataError(
        f"{FIELD}: {source} holds fewer tokens than one row of {length}. Give a longer text or shorter rows."
    )


def hold_back(rows: PackedRows | StreamedRows) -> tuple[PackedRows | StreamedRows, Tensor | None]:
    """Return the rows to train on, and token ids [N, L] of rows that are held back to measure the training on.

    They are evenly spaced, and the first ones of a stream. Where there is too little text nothing is held back.
    """
    if isinstance(rows, StreamedRows):
        rest = StreamedRows(rows.tokenizer, rows.source, rows.length, rows.chats, MOST_HELD_BACK)
        if next(iter(rest), None) is None:
            return rows, None
        return rest, torch.stack([row["input_ids"] for row in islice(rows, MOST_HELD_BACK)])
    count = min(MOST_HELD_BACK, len(rows) // ROWS_PER_HELD_BACK)
    if not count:
        return rows, None
    held = torch.zeros(len(rows), dtype=torch.bool)
    held[torch.linspace(0, len(rows), count + 2)[1:-1].long()] = True
    return PackedRows(rows.ids[~held]), rows.ids[held]


def preferences(source: str | Path) -> Any:
    """Return pairs for DPO, a `datasets.Dataset` of `prompt`, `chosen` and `rejected`.

    Args:
        source: What `optimum_mla.io.documents.read_rows` reads, with these columns as strings.

    Raises:
        CalibrationDataError: A column is missing (named with its row), or there is no row.
    """
    from datasets import Dataset as Table

    columns: dict[str, type] = {"prompt": str, "chosen": str, "rejected": str}
    rows = [{name: row[name] for name in columns} for row in read_rows(source, columns)]
    if not rows:
        raise CalibrationDataError(f"{FIELD}: {source} holds no rows. DPO needs prompt, chosen and rejected in each.")
    return Table.from_list(rows)
