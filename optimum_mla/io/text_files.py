"""Text files read piece by piece: encodings, compression, and places at which a text may be cut."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from optimum_mla.core.errors import CalibrationDataError, first_line

COMPRESSIONS: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
"""Functions that open a compressed file, by its suffix."""
ARCHIVES = (".zip", ".zst", ".7z", ".rar", ".tar", ".tgz", ".lz4")
"""Suffixes of files that have to be unpacked by the user."""
PIECE_CHARACTERS = 65_536
"""A text is read and tokenized in pieces of at most so many characters."""
CUTS = tuple(re.compile(f".*[^\\W_](?={after})", re.DOTALL) for after in (r" [^\W_]", r"\s", r"\W"))
"""Expressions that match a text up to its last good place for a cut, the best kind of place first.

Tokenizers split a text between a word and white space before they look for tokens, so a cut there changes no token.
One space with a word behind it is best, because a tokenizer that puts a space in front of every text restores it. In
a script without spaces a cut behind a word has to do.
"""
NO_CHARACTERS = re.compile("[\0\ud800-\udfff]")
"""NUL, which tells UTF-16 and binary files, and halves of surrogate pairs, which tokenizers refuse."""


@contextmanager
def open_text(file: Path, newline: str | None = None) -> Iterator[TextIO]:
    """Open a UTF-8 file for reading, with or without a byte-order mark, decompressed if its name says so.

    Args:
        file: The file; `.gz`, `.bz2` and `.xz` files are decompressed while they are read.
        newline: Which line ends are translated, as for the built-in `open`.

    Raises:
        CalibrationDataError: The file is missing, unreadable, damaged or not UTF-8, now or while it is read.
    """
    suffix = file.suffix.lower()
    if suffix in ARCHIVES:
        raise CalibrationDataError(f"text: {file} is a {suffix} archive. Unpack it and give the file inside.")
    try:
        with COMPRESSIONS.get(suffix, open)(file, mode="rt", encoding="utf-8-sig", newline=newline) as handle:
            try:
                yield handle
            except UnicodeDecodeError as error:
                byte = handle.buffer.tell() - len(error.object) + error.start
                raise CalibrationDataError(
                    f"text: {file} is not UTF-8 (byte {byte}). Convert it, for example with iconv, if it is a text."
                ) from error
    except CalibrationDataError:
        raise
    except FileNotFoundError as error:
        raise CalibrationDataError(f"text: no file {file}. Give a UTF-8 file or a dataset name.") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise CalibrationDataError(f"text: {file} could not be read: {first_line(error)}") from error


def text_pieces(text: TextIO, name: object) -> Iterator[str]:
    """Yield a text in pieces of at most `PIECE_CHARACTERS` characters that together are the text.

    The cuts are the same whenever the text is. Only as much is read as has been asked for.

    Args:
        text: An open text.
        name: What error messages call it.

    Raises:
        CalibrationDataError: The text holds characters that no text holds: NUL, or one half of a surrogate pair.
    """
    rest = ""
    while block := text.read(PIECE_CHARACTERS - len(rest)):
        if match := NO_CHARACTERS.search(block):
            raise CalibrationDataError(
                f"text: {name} holds U+{ord(match[0]):04X}, which no text holds. Convert it to UTF-8 text."
            )
        rest += block
        if len(rest) < PIECE_CHARACTERS:
            continue
        end = _last_cut(rest)
        yield rest[:end]
        rest = rest[end:]
    if rest:
        yield rest


def _last_cut(text: str) -> int:
    """Return how many characters lie before the last good place for a cut in the text's second half, or all."""
    half = len(text) // 2
    for expression in CUTS:
        if match := expression.match(text, half):
            return match.end()
    return len(text)
