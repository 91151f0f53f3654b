"""Documents and chats: what calibration, evaluation and training read."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optimum_mla.core.errors import CalibrationDataError
from optimum_mla.io.rows import ROW_FILES, files_of, is_dataset_name, kind_of, read_rows
from optimum_mla.io.text_files import open_text, text_pieces


def read_documents(source: str | Path) -> Iterator[Iterator[str]]:
    """Yield documents, each as an iterator over pieces that are read when they are asked for.

    Args:
        source: A UTF-8 text file, whose text is one document; a file or a dataset of rows as for
            `optimum_mla.io.rows.read_rows`, whose `text` is one document a row, left out where it is null or empty;
            or a folder of `.txt` files or of files of rows.

    Raises:
        CalibrationDataError: There is no such file or dataset, it holds no text, or it is not UTF-8.
        MissingDependencyError: Parquet, Arrow or a dataset is asked for and `datasets` is not installed.
    """
    if is_dataset_name(source):
        yield from _documents_of_rows(source)
        return
    for file in files_of(source):
        if kind_of(file) in ROW_FILES:
            yield from _documents_of_rows(file)
        else:
            yield _pieces_of_file(file)


def read_chats(source: str | Path) -> Iterator[list[dict[str, Any]]]:
    """Yield chats: the `messages` of each row.

    Args:
        source: A file, a folder or a dataset of rows, as for `optimum_mla.io.rows.read_rows`.

    Raises:
        CalibrationDataError: As for `read_rows`, or the messages of a row are no objects.
    """
    for row in read_rows(source, {"messages": list}):
        if not all(isinstance(message, dict) for message in row["messages"]):
            raise CalibrationDataError(
                f"text: a chat of {source} has messages that are no objects. Give each message a role and a content."
            )
        yield row["messages"]


def _documents_of_rows(source: str | Path) -> Iterator[Iterator[str]]:
    for row in read_rows(source, {"text": str}, skip_empty=True):
        yield text_pieces(io.StringIO(row["text"], newline=""), f"a row of {source}")


def _pieces_of_file(file: Path) -> Iterator[str]:
    with open_text(file) as handle:
        yield from text_pieces(handle, file)
