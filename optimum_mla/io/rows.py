"""Rows of JSON, CSV, Parquet and Arrow files and of datasets, each checked for the columns that are needed."""

from __future__ import annotations

import csv
import glob
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from optimum_mla.core.errors import CalibrationDataError, MissingDependencyError, first_line
from optimum_mla.io.text_files import ARCHIVES, COMPRESSIONS, open_text

PlacedRows = Iterator[tuple[str, Any]]
"""Rows, each with the words that say where it was found, such as "line 3"."""
LONGEST_FIELD = 2**31 - 1
"""Characters in one field of a CSV file: the largest limit that the `csv` module takes on every platform."""


def read_rows(source: str | Path, columns: dict[str, type], skip_empty: bool = False) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file, of the files of a folder, or of a dataset, reading no more than is asked for.

    Args:
        source: A `.jsonl`, `.ndjson`, `.json`, `.csv`, `.tsv`, `.parquet` or `.arrow` file (files with another suffix
            are read as JSON Lines), a folder of files of one of these kinds, or a dataset as
            `NAME[:CONFIG[:SPLIT]]`. The text formats may be compressed (`.gz`, `.bz2`, `.xz`).
        columns: The columns that every row must have, with the types of their values.
        skip_empty: Leave out rows in which one of these columns is null or empty.

    Raises:
        CalibrationDataError: There is no such file or dataset, it is malformed, or a row lacks a column.
        MissingDependencyError: Parquet, Arrow or a dataset is asked for and `datasets` is not installed.
    """
    for place, row in _placed_rows(source):
        if not isinstance(row, dict):
            raise CalibrationDataError(f"text: {place} is no object with columns, but a {type(row).__name__}.")
        if skip_empty and any(name in row and row[name] in (None, "", []) for name in columns):
            continue
        for name, kind in columns.items():
            if name not in row:
                has = ", ".join(map(str, row)) or "none"
                hint = " Chats need --chat-template." if name == "text" and "messages" in row else ""
                raise CalibrationDataError(
                    f"text: {place} has no {kind.__name__} {name!r}. It has these columns only: {has}.{hint}"
                )
            if not isinstance(row[name], kind):
                found = "null" if row[name] is None else f"of type {type(row[name]).__name__}"
                raise CalibrationDataError(f"text: {place} has no {kind.__name__} {name!r}: the value is {found}.")
        yield row


def is_dataset_name(source: str | Path) -> bool:
    """Tell whether a source is meant as a dataset: nothing of that name exists, and it does not end like a file."""
    if not str(source).strip():
        raise CalibrationDataError("text: got an empty name, allowed: a file, a folder or a dataset name.")
    known = (*TEXT_SUFFIXES, *ROW_FILES, *COMPRESSIONS, *ARCHIVES)
    return not os.path.exists(source) and Path(source).suffix.lower() not in known


def kind_of(file: Path) -> str:
    """Return the suffix that tells a file's format, in lower case, without that of its compression."""
    compressed = file.suffix.lower() in COMPRESSIONS
    return (file.with_suffix("") if compressed else file).suffix.lower()


def files_of(source: str | Path) -> list[Path]:
    """Return a file, or the files of a folder in the order of their names.

    A folder's text is in its `.txt` files or in its files of rows; hidden files, files that describe a saved dataset,
    files of other kinds and folders inside it are no part of it.

    Raises:
        CalibrationDataError: The file is missing, or the folder holds no data or data of several kinds.
    """
    path = Path(source)
    if not os.path.isdir(path):
        if not os.path.isfile(path):
            problem = "this is no regular file:" if os.path.exists(path) else "there is no file"
            raise CalibrationDataError(
                f"text: {problem} {source}. Give a UTF-8 text file, a folder of them, or a dataset name."
            )
        return [path]
    kinds: dict[str, list[Path]] = {}
    try:
        entries = sorted(path.iterdir())
    except OSError as error:
        raise CalibrationDataError(f"text: the folder {source} could not be read: {first_line(error)}") from error
    for file in entries:
        kind = kind_of(file)
        if kind in FOLDER_KINDS and file.is_file() and file.name[0] != "." and file.name not in DESCRIPTIONS:
            kinds.setdefault(kind, []).append(file)
    if not kinds:
        raise CalibrationDataError(
            f"text: the folder {source} holds no {', '.join(FOLDER_KINDS)} files. Give a text file, a folder of them, "
            f"or FOLDER:default:train for a dataset in folders of its own."
        )
    if len(kinds) > 1:
        found = ", ".join(f"{len(files)} {kind}" for kind, files in sorted(kinds.items()))
        raise CalibrationDataError(
            f"text: the folder {source} holds files of several kinds ({found}). Give a file, or a folder of one kind."
        )
    return next(iter(kinds.values()))


def _placed_rows(source: str | Path) -> PlacedRows:
    if is_dataset_name(source):
        yield from _dataset(str(source))
        return
    for file in files_of(source):
        yield from ROW_FILES.get(kind_of(file), _json_lines)(file)


def _json_lines(file: Path) -> PlacedRows:
    # The json module keeps each row as it was written; datasets fills in absent keys and guesses dates and numbers.
    # Only "\n" ends a line: JSON strings may hold U+2028 and others that str.splitlines cuts at.
    with open_text(file, newline="\n") as handle:
        for number, line in enumerate(handle, start=1):
            if line.strip():
                yield f"line {number} of {file}", _parsed(line, f"line {number} of {file}", "Give one object per line.")


def _json(file: Path) -> PlacedRows:
    with open_text(file) as handle:
        while (character := handle.read(1)).isspace():
            pass
        if character == "[":
            # An array has no lines to go by, so it is read whole.
            rows = _parsed(character + handle.read(), str(file), "Give an array of objects, or one object per line.")
            yield from ((f"row {number} of {file}", row) for number, row in enumerate(rows, start=1))
            return
    yield from _json_lines(file)


def _parsed(text: str, place: str, remedy: str) -> Any:
    try:
        # strict=False takes control characters inside strings, such as a form feed.
        return json.loads(text, strict=False)
    except (ValueError, RecursionError) as error:
        raise CalibrationDataError(f"text: {place} is not JSON: {first_line(error)}. {remedy}") from error


def _csv(file: Path) -> PlacedRows:
    # The csv module leaves every value a string; datasets turns "None" and "NA" to nulls and digits to numbers.
    csv.field_size_limit(LONGEST_FIELD)
    with open_text(file, newline="") as handle:
        reader = csv.DictReader(handle, delimiter="\t" if kind_of(file) == ".tsv" else ",", strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise CalibrationDataError(
                        f"text: the row that ends in line {reader.line_num} of {file} has not as many fields as the "
                        "header. Put quotes around fields that hold the delimiter."
                    )
                yield f"the row that ends in line {reader.line_num} of {file}", row
        except csv.Error as error:
            raise CalibrationDataError(f"text: {file} is not CSV near line {reader.line_num + 1}: {error}") from error


def _table(file: Path) -> PlacedRows:
    if file.suffix.lower() in COMPRESSIONS:
        raise CalibrationDataError(f"text: {file} is a compressed {kind_of(file)} file. Decompress it first.")
    # The name is a pattern to datasets.
    pattern, builder = glob.escape(str(file)), kind_of(file).lstrip(".")
    return _loaded(
        lambda datasets: datasets.load_dataset(builder, data_files=pattern, split="train", streaming=True),
        str(file),
        f"text: {file} is no readable {kind_of(file)} file",
    )


def _dataset(name: str) -> PlacedRows:
    parts = name.split(":")
    if len(parts) > 3:
        raise CalibrationDataError(f"text: got {name!r}, allowed: NAME, NAME:CONFIG or NAME:CONFIG:SPLIT.")
    repository, config, split = [*parts, "", ""][:3]
    return _loaded(
        lambda datasets: datasets.load_dataset(repository, config or None, split=split or "train", streaming=True),
        f"dataset {name!r}",
        f"text: {name!r} is no file here and did not load as a dataset",
    )


def _loaded(load: Callable[[Any], Any], name: str, problem: str) -> PlacedRows:
    """Yield what the datasets library reads, as a stream; whatever it raises becomes one line."""
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError("datasets", "train", f"read {name}") from error
    level = datasets.logging.get_verbosity()
    try:
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # Its log would say the same as the error.
        for number, row in enumerate(load(datasets), start=1):
            yield f"row {number} of {name}", row
    except MemoryError:
        raise
    except Exception as error:  # The hub, the network and the readers of files raise errors of many unrelated types.
        raise CalibrationDataError(f"{problem}: {first_line(error)}") from error
    finally:
        datasets.logging.set_verbosity(level)


TEXT_SUFFIXES = (".txt", ".text", ".md")
"""Suffixes of plain text."""
ROW_FILES: dict[str, Callable[[Path], PlacedRows]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _table,
    ".arrow": _table,
}
"""Readers of files of rows, by suffix."""
FOLDER_KINDS = (".txt", *ROW_FILES)
"""The files of a folder that hold its text: a `.md` file there describes the others."""
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files that `datasets` saves beside the data."""
