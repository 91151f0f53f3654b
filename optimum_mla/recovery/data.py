"""Training data: documents packed into rows of equal length."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from optimum_mla.errors import CalibrationDataError, InvalidValueError
from optimum_mla.text import read_rows, token_chunks

FIELD = "train-data"
Source = str | Path | Iterable[int]


class PackedRows(Dataset):
    """Rows of token ids in memory.

    Args:
        ids: [N, L].
    """

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}

    def describe(self) -> dict[str, Any]:
        """For the report."""
        digest = hashlib.sha256(self.ids.numpy().tobytes()).hexdigest()
        return {"rows": len(self.ids), "tokens_per_row": self.ids.shape[1], "sha256": digest}


class StreamedRows(IterableDataset):
    """Rows that are read and packed while training goes on; nothing is kept.

    Args:
        tokenizer: A Transformers tokenizer.
        source: As for `pack`. length: Tokens per row. chats: As for `pack`.
    """

    def __init__(self, tokenizer: Any, source: Source, length: int, chats: bool = False) -> None:
        self.tokenizer, self.source, self.length, self.chats = tokenizer, source, length, chats

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for row in packed_rows(self.tokenizer, self.source, self.length, self.chats):
            ids = torch.tensor(row)
            yield {"input_ids": ids, "labels": ids}

    def describe(self) -> dict[str, Any]:
        """For the report: what was streamed is not hashed."""
        return {"rows": None, "tokens_per_row": self.length, "sha256": None}


def packed_rows(tokenizer: Any, source: Source, length: int, chats: bool = False) -> Iterator[list[int]]:
    """Documents one behind the other, an end-of-text token between them, cut into rows of `length` tokens.

    What is left at the end, fewer tokens than a row, is dropped.
    """
    ids: list[int] = []
    end = getattr(tokenizer, "eos_token_id", None)
    for chunk in token_chunks(tokenizer, source, chats):
        ids += chunk
        if end is not None and isinstance(source, str | Path):
            ids.append(end)
        whole = len(ids) // length * length
        yield from (ids[start : start + length] for start in range(0, whole, length))
        ids = ids[whole:]


def pack(tokenizer: Any, source: Source, length: int, tokens: int | None = None, chats: bool = False) -> PackedRows:
    """Packed rows of a whole text.

    Args:
        tokenizer: A Transformers tokenizer; not used for token ids.
        source: What `optimum_mla.text.read_documents` reads, or token ids.
        length: Tokens per row.
        tokens: Read no more than so many; None reads everything.
        chats: `source` is what `read_chats` reads, to be rendered by the tokenizer's chat template.

    Raises:
        CalibrationDataError: The text is missing, malformed or shorter than one row.
    """
    wanted = None if tokens is None else tokens // length
    rows = []
    for row in packed_rows(tokenizer, source, length, chats):
        rows.append(row)
        if len(rows) == wanted:
            break
    if not rows:
        raise CalibrationDataError(
            f"{FIELD}: {source} holds fewer tokens than one row of {length}. Give a longer text or shorter rows."
        )
    return PackedRows(torch.tensor(rows))


def stream(tokenizer: Any, source: Source, length: int, chats: bool = False) -> StreamedRows:
    """As `pack`, read while training goes on.

    Raises:
        CalibrationDataError: As `pack`, found by reading the first row.
    """
    rows = StreamedRows(tokenizer, source, length, chats)
    if next(iter(rows), None) is None:
        raise CalibrationDataError(f"{FIELD}: {source} holds fewer tokens than one row of {length}.")
    return rows


def preferences(source: str | Path) -> Any:
    """Pairs for DPO, a `datasets.Dataset` of `prompt`, `chosen` and `rejected`.

    Args:
        source: A `.jsonl` file or a dataset whose rows have these columns, as strings.

    Raises:
        CalibrationDataError: A column is missing (named with its line), or there is no row.
    """
    from datasets import Dataset as Table

    columns: dict[str, type] = {"prompt": str, "chosen": str, "rejected": str}
    rows = [{name: row[name] for name in columns} for row in read_rows(source, columns)]
    if not rows:
        raise CalibrationDataError(f"{FIELD}: {source} holds no rows. DPO needs prompt, chosen and rejected in each.")
    return Table.from_list(rows)


def check_length(length: int | None, longest: int, default: int) -> int:
    """Tokens per row, if the model takes so many."""
    length = min(default, longest) if length is None else length
    if not 2 <= length <= longest:
        raise InvalidValueError("sequence_length", length, f"2 to {longest} for this model")
    return length
