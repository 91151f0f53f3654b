"""Documents, chats and rows: every text of a user comes in here, and whatever goes wrong becomes one line."""

from __future__ import annotations

import bz2
import csv
import glob
import gzip
import io
import json
import logging
import lzma
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO, TypeVar

from optimum_mla.core.errors import CalibrationDataError, MLAError, first_line

Item = TypeVar("Item")
Reader = Callable[[Any], Iterator[Any]]
"""Yields the rows of a file, or of a dataset by its name."""
OPENERS: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
"""Functions that open a compressed file, by its suffix."""
ARCHIVES = (".zip", ".zst", ".7z", ".rar", ".tar", ".tgz", ".lz4")
"""Suffixes of what a user has to unpack."""
BLOCK_CHARACTERS = 65_536
"""Characters of a document that are read at once."""
NO_CHARACTERS = re.compile("[\0\ud800-\udfff]")
"""NUL, which tells UTF-16 and binary files, and halves of surrogate pairs, which tokenizers refuse."""
ABOUT_DATA = re.compile(r"\..*|.*\.md|dataset_infos?\.json|dataset_dict\.json|state\.json")
"""Names of files of a folder that are no data: hidden ones, pages, and what `datasets` saves beside the data."""
REMEDY = "Give a file or a folder of UTF-8 text, JSON, CSV, Parquet or Arrow, or a dataset as NAME[:CONFIG[:SPLIT]]."


def read_documents(source: str | Path) -> Iterator[Iterator[str]]:
    """Yield documents, each as an iterator over blocks of text that are read when they are asked for.

    Args:
        source: What `read_rows` reads, whose `text` is one document a row (an empty one is left out); any other file,
            whose UTF-8 text is one document; or a folder of `.txt` files.

    Raises:
        CalibrationDataError: As for `read_rows`, or a text is not UTF-8.
    """
    for part in _guarded(_parts(source), source):
        if isinstance(part, Path) and _kind(part) not in READERS:
            yield _guarded(_blocks(part), part)
            continue
        for row in _checked_rows(part, {"text": str}):
            if row["text"]:
                yield _guarded(_blocks(row["text"]), f"a row of {part}")


def read_rows(source: str | Path, columns: dict[str, type]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file, of the files of a folder, or of a dataset, reading no more than is asked for.

    Args:
        source: A file with a suffix of `READERS` (any other is read as JSON Lines), which may be compressed (`.gz`,
            `.bz2`, `.xz`) unless it is Parquet or Arrow; a folder of files of one of these kinds; or a dataset as
            `NAME[:CONFIG[:SPLIT]]`.
        columns: The columns that every row must have, with the types of their values.

    Raises:
        CalibrationDataError: There is no such file or dataset, it cannot be read, or a row lacks a column.
    """
    for part in _guarded(_parts(source), source):
        yield from _checked_rows(part, columns)


def _checked_rows(part: str | Path, columns: dict[str, type]) -> Iterator[dict[str, Any]]:
    reader: Reader = READERS.get(_kind(part), _json) if isinstance(part, Path) else _dataset
    for number, row in enumerate(_guarded(reader(part), part, "row"), start=1):
        for name, kind in columns.items():
            if not isinstance(row, dict) or not isinstance(row.get(name), kind):
                found = row if isinstance(row, dict) else {"a value": row}
                types = ", ".join(f"{key} ({type(value).__name__})" for key, value in found.items())
                hint = " Chats need --chat-template." if "messages" in found and name == "text" else ""
                raise CalibrationDataError(
                    f"text: row {number} of {part} has no {kind.__name__} {name!r}, only {types or 'nothing'}.{hint}"
                )
        yield row


def _guarded(items: Iterator[Item], name: object, unit: str = "") -> Iterator[Item]:
    """Yield what is read; whatever reading raises becomes one line that names the source, and the place by its unit."""
    number = 0
    try:
        for item in items:
            yield item
            number += 1
    except (MLAError, MemoryError):
        raise
    except Exception as error:  # Decoders, parsers, file systems and the hub raise errors of many unrelated types.
        place = f" after {unit} {number}" if unit and number else ""
        problem = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else "could not be read"
        raise data_error(f"text: {name} {problem}{place}", error, REMEDY) from error


def data_error(what: str, error: Exception, remedy: str = "") -> CalibrationDataError:
    """Return an error of one line: what went wrong with a text, what the raised error says of it, and what to do."""
    return CalibrationDataError(f"{what}: {first_line(error).rstrip('.')}. {remedy}".rstrip())


def _parts(source: str | Path) -> Iterator[Path | str]:
    """Yield a file, the files of a folder in the order of their names, or the name of a dataset."""
    path = Path(source)
    if not str(source).strip():
        raise CalibrationDataError(f"text: got an empty name. {REMEDY}")
    suffix = path.suffix.lower()
    if suffix in ARCHIVES or (suffix in OPENERS and _kind(path) in (".parquet", ".arrow")):
        raise CalibrationDataError(f"text: {source} is packed as {suffix}. Unpack it and give what is inside.")
    if not os.path.isdir(source):
        known = (".txt", ".text", ".md", *OPENERS, *READERS)
        yield path if os.path.exists(source) or suffix in known else str(source)
        return
    files = [file for file in sorted(path.iterdir()) if file.is_file() and not ABOUT_DATA.fullmatch(file.name)]
    kinds = sorted({_kind(file) for file in files})
    if len(kinds) != 1 or kinds[0] not in (".txt", *READERS):
        found = f"files of the kinds {', '.join(map(repr, kinds))}" if kinds else "no files of text"
        raise CalibrationDataError(
            f"text: the folder {source} holds {found}, allowed: files of one of the kinds .txt, {', '.join(READERS)}. "
            "Give FOLDER:default:train for a dataset in folders of its own."
        )
    yield from files


def _kind(file: Path) -> str:
    """Return the suffix that tells a file's format, in lower case, without that of its compression."""
    return (file.with_suffix("") if file.suffix.lower() in OPENERS else file).suffix.lower()


def _open(file: Path, newline: str | None = None) -> TextIO:
    return OPENERS.get(file.suffix.lower(), open)(file, mode="rt", encoding="utf-8-sig", newline=newline)


def _blocks(document: Path | str) -> Iterator[str]:
    """Yield the text of a file, or a text, in blocks."""
    with io.StringIO(document, newline="") if isinstance(document, str) else _open(document) as text:
        while block := text.read(BLOCK_CHARACTERS):
            if match := NO_CHARACTERS.search(block):
                raise ValueError(f"it holds U+{ord(match[0]):04X}, which no text holds")
            yield block


# JSON and CSV are read as they were written. `datasets` guesses dates and numbers, turns numbers into strings where
# they come late, lets a row without a column look like one with a null, and refuses a file with a key that comes late.


def _json(file: Path) -> Iterator[Any]:
    # Only "\n" ends a line: JSON strings may hold U+2028 and others. strict=False takes control characters in strings.
    with _open(file, newline="\n") as text:
        for number, line in enumerate(text, start=1):
            if not line.strip():
                continue
            is_array = line.lstrip().startswith("[")
            written = line + text.read() if is_array else line  # An array has no lines to go by, so it is read whole.
            try:
                found = json.loads(written, strict=False)
            except (ValueError, RecursionError) as error:
                remedy = "Give one object a line, or an array of objects."
                raise data_error(f"text: line {number} of {file} is not JSON", error, remedy) from error
            yield from found if is_array else [found]


def _csv(file: Path) -> Iterator[dict[str, str]]:
    csv.field_size_limit(2**31 - 1)  # The largest limit that is taken on every platform.
    with _open(file, newline="") as text:
        for row in csv.DictReader(text, delimiter="\t" if _kind(file) == ".tsv" else ",", strict=True):
            if None in row or None in row.values():
                raise ValueError("a row has not as many fields as the header; quote fields that hold delimiters")
            yield row


def _table(file: Path) -> Iterator[dict[str, Any]]:
    # The name is a pattern to `datasets`.
    return _streamed(_kind(file)[1:], data_files=glob.escape(str(file)), split="train")


def _dataset(name: str) -> Iterator[dict[str, Any]]:
    repository, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    return _streamed(repository, config or None, split=split or "train")


def _streamed(*arguments: Any, **options: Any) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset  # It takes a second, which text, JSON and CSV need not.

    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # Its log would say the same as the error.
    # Iterated in a worker of a `DataLoader` the dataset itself would give that worker's share of the files only.
    for batch in load_dataset(*arguments, **options, streaming=True).iter(batch_size=1):
        yield {name: values[0] for name, values in batch.items()}


READERS: dict[str, Reader] = {
    ".jsonl": _json,
    ".ndjson": _json,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _table,
    ".arrow": _table,
}
"""Readers of files of rows, by suffix."""
