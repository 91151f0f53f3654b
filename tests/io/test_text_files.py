"""Text files are read piece by piece, and what is no text is named."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimum_mla.core.errors import CalibrationDataError
from optimum_mla.io.text_files import PIECE_CHARACTERS, open_text, text_pieces


@given(
    words=st.lists(st.text(st.sampled_from("ab 7_\n\u2028\u0085\x0c，漢字"), max_size=9), min_size=1),
    fill=st.text("xy z"),
)
def test_pieces_are_the_text(words: list[str], fill: str) -> None:
    unit = "".join(words) + fill
    text = unit * (2 * PIECE_CHARACTERS // max(1, len(unit)))
    pieces = list(text_pieces(io.StringIO(text, newline=""), "text"))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= PIECE_CHARACTERS for piece in pieces)
    assert len(pieces) <= 1 + len(text) // (PIECE_CHARACTERS // 2)


@pytest.mark.parametrize(
    ("unit", "before", "after"),
    [("ab. cd\n\nef gh\n", "f", " g"), ("ab.\n\ncd\n", "d", "\n"), ("ab.;\u0301", "b", ".;"), ("漢字，", "字", "，")],
)
def test_cuts_are_where_tokenizers_split(unit: str, before: str, after: str) -> None:
    pieces = list(text_pieces(io.StringIO(unit * PIECE_CHARACTERS), "text"))
    assert len(pieces) > 2
    assert pieces[0].endswith(before)
    assert pieces[1].startswith(after)


def test_no_more_is_read_than_is_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "big.txt"
    with file.open("wb") as handle:
        handle.write(b"All that is read. " * 30_000)
        handle.truncate(10**12)  # A sparse file: reading a terabyte of NUL would be noticed, and would be refused.
    with open_text(file) as handle:
        pieces = text_pieces(handle, file)
        assert next(pieces).startswith("All that is read.")
        assert handle.buffer.tell() < 2 * PIECE_CHARACTERS


def test_compressed_files_and_byte_order_marks(tmp_path: Path) -> None:
    text = "Café, naïve.\r\nNext line."
    for name, module in (("a.txt.gz", gzip), ("a.txt.bz2", bz2), ("a.txt.xz", lzma)):
        with module.open(tmp_path / name, "wb") as handle:
            handle.write(text.encode("utf-8-sig"))
        with open_text(tmp_path / name) as opened:
            assert opened.read() == "Café, naïve.\nNext line."


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("place", [0, 5, 8191, 100_000])
def test_the_byte_that_is_not_utf_8_is_named(place: int, mark: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(mark + b"a" * place + b"\xe9 b")
    with (
        pytest.raises(CalibrationDataError, match=rf"a.txt is not UTF-8 \(byte {len(mark) + place}\)"),
        open_text(tmp_path / "a.txt") as handle,
    ):
        list(text_pieces(handle, "a.txt"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt.gz", b"no gzip", "could not be read: Not a gzipped file"),
        ("a.txt.gz", gzip.compress(b"text " * 1000, mtime=0)[:30], "could not be read: Compressed file ended"),
        ("a.txt.xz", b"no xz", "could not be read"),
        ("a.zip", b"PK", r"is a \.zip archive. Unpack it"),
        ("a.txt", "utf-16".encode("utf-16-le"), r"holds U\+0000"),
        ("a.txt", "utf-16".encode("utf-16"), r"not UTF-8 \(byte 0\)"),
        ("missing.txt", None, "no file"),
    ],
)
def test_what_is_no_text_is_one_line(name: str, content: bytes | None, words: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationDataError, match=words) as caught, open_text(tmp_path / name) as handle:
        list(text_pieces(handle, tmp_path / name))
    assert "\n" not in str(caught.value)
