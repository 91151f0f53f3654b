"""Text for calibration and evaluation: files or datasets, cut into windows of token ids."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from optimum_mla.errors import CalibrationDataError, MissingDependencyError

FILE_SUFFIXES = (".txt", ".text", ".md", ".json", ".jsonl", ".csv", ".parquet")
"""A name that ends like this is meant as a file: it is not looked up as a dataset where it is missing."""
ROWS_SUFFIX = ".jsonl"


def read_documents(source: str | Path) -> Iterator[str]:
    """Yield the documents of a text file, of a folder of `*.txt` files, of a JSON Lines file, or of a dataset.

    Args:
        source: A path, or a dataset as `NAME[:CONFIG[:SPLIT]]` (split `train` unless named), read as a stream by
            the `datasets` library. Rows of a `.jsonl` file or of a dataset need a `text`.

    Raises:
        CalibrationDataError: No such file or dataset, no text in it, or not UTF-8.
        MissingDependencyError: A dataset is asked for and `datasets` is not installed.
    """
    path = Path(source)
    if path.suffix == ROWS_SUFFIX or (path.suffix not in FILE_SUFFIXES and not path.exists()):
        yield from (row["text"] for row in read_rows(source, {"text": str}))
        return
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        if not files:
            raise CalibrationDataError(f"text: {source} holds no *.txt files. Give a text file or a folder of them.")
    elif path.is_file():
        files = [path]
    else:
        raise CalibrationDataError(
            f"text: no file {source}. Give a UTF-8 text file, a folder of them, or a dataset name."
        )
    yield from (_read(file) for file in files)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise CalibrationDataError(f"text: no file {file}. Give a UTF-8 file or a dataset name.") from error
    except UnicodeDecodeError as error:
        raise CalibrationDataError(
            f"text: {file} is not UTF-8 (byte {error.start}). Convert it, for example with iconv."
        ) from error


def read_rows(source: str | Path, columns: dict[str, type]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSON Lines file or of a dataset.

    Args:
        source: A `.jsonl` file (any file, if it exists), or a dataset as for `read_documents`.
        columns: What every row must have, and of which type.

    Raises:
        CalibrationDataError: No such file or dataset, a line that is not JSON, or a row that lacks a column.
    """
    path = Path(source)
    if path.suffix not in FILE_SUFFIXES and not path.is_file():
        yield from _dataset_rows(str(source), columns)
        return
    for number, line in enumerate(_read(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CalibrationDataError(
                f"text: line {number} of {source} is not JSON. Give one object per line."
            ) from error
        for column, kind in columns.items():
            if not isinstance(row, dict) or not isinstance(row.get(column), kind):
                raise CalibrationDataError(f"text: line {number} of {source} has no {kind.__name__} {column!r}.")
        yield row


def _dataset_rows(name: str, columns: dict[str, type]) -> Iterator[dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError("datasets", "train", f"read {name!r}, which is no file") from error
    repository, config, split = [*name.split(":"), None, None][:3]
    try:
        rows = datasets.load_dataset(repository, config or None, split=split or "train", streaming=True)
        for row in rows:
            for column in columns:
                if column not in row:
                    has = ", ".join(row)
                    raise CalibrationDataError(f"text: dataset {name!r} has no column {column!r}, only: {has}.")
            yield row
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, CalibrationDataError):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CalibrationDataError(f"text: {name!r} is no file here and did not load as a dataset: {reason}") from error


def read_chats(source: str | Path) -> Iterator[list[dict[str, Any]]]:
    """Yield the chats of a JSON Lines file or of a dataset: the `messages` of each row.

    Args:
        source: A `.jsonl` file, or a dataset as for `read_documents`.

    Raises:
        CalibrationDataError: No such file or dataset, no JSON, or a row without messages.
    """
    yield from (row["messages"] for row in read_rows(source, {"messages": list}))


def token_chunks(tokenizer: Any, source: str | Path | Iterable[int], chats: bool = False) -> Iterator[list[int]]:
    """Token ids, document by document (or chat by chat); arguments as for `token_windows`."""
    yield from _chat_chunks(tokenizer, source) if chats else _token_chunks(tokenizer, source)


def token_windows(
    tokenizer: Any,
    source: str | Path | Iterable[int],
    length: int,
    samples: int | None = None,
    field: str = "calibration-data",
    chats: bool = False,
) -> Tensor:
    """Consecutive windows of token ids, [N, length], from the beginning of the text.

    Args:
        tokenizer: A Transformers tokenizer; not used when `source` is an iterable of token ids.
        source: What `read_documents` reads, or token ids.
        length: Tokens per window.
        samples: At most so many windows (reading stops there); None takes the whole text.
        field: Name of the option that gave `source`, for the error message.
        chats: `source` is what `read_chats` reads, to be rendered by the tokenizer's chat template.

    Raises:
        CalibrationDataError: The text is empty or shorter than one window, or a chat does not render.
    """
    wanted = None if samples is None else samples * length
    ids: list[int] = []
    for chunk in token_chunks(tokenizer, source, chats):
        ids += chunk
        if wanted is not None and len(ids) >= wanted:
            break
    count = len(ids) // length if samples is None else min(samples, len(ids) // length)
    if count == 0:
        raise CalibrationDataError(
            f"{field}: {source} holds {len(ids)} tokens, fewer than one sample of {length}. "
            "Give a longer text or shorter samples."
        )
    return torch.tensor(ids[: count * length], dtype=torch.long).view(count, length)


def _token_chunks(tokenizer: Any, source: str | Path | Iterable[int]) -> Iterator[list[int]]:
    if isinstance(source, str | Path):
        for document in read_documents(source):
            # verbose=False: a book is longer than the model's context, and is cut into windows on purpose.
            yield tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
    else:
        yield [int(token) for token in source]


def _chat_chunks(tokenizer: Any, source: Any) -> Iterator[list[int]]:
    if not isinstance(source, str | Path):
        raise CalibrationDataError("chat-template: got token ids, allowed: a .jsonl file or a dataset of chats.")
    if getattr(tokenizer, "chat_template", None) is None:
        raise CalibrationDataError("chat-template: the model's tokenizer has none. Give plain text instead.")
    for messages in read_chats(source):
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False)
        except (TypeError, ValueError, KeyError, TemplateError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CalibrationDataError(f"chat-template: a chat of {source} does not render: {reason}") from error
        yield tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
