"""Every format holds the same documents, and what is wrong with a source is one line."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimum_mla.core.errors import CalibrationDataError
from optimum_mla.io.documents import BLOCK_CHARACTERS, read_documents, read_rows

ODD = ["a\u2028b\u0085c\u2029d", "None", "5", "2020-01-01", 'with "quotes", commas\nand lines', "漢字"]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    datasets.disable_progress_bars()


def texts_of(source: str | Path) -> list[str]:
    return ["".join(document) for document in read_documents(source)]


def as_csv(texts: list[str], delimiter: str = ",") -> str:
    written = io.StringIO(newline="")
    writer = csv.writer(written, delimiter=delimiter)
    writer.writerows([["number", "text"], *([str(number), text] for number, text in enumerate(texts))])
    return written.getvalue()


def as_lines(texts: list[str]) -> str:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


def as_array(texts: list[str]) -> str:
    return "\n" + json.dumps([{"text": text} for text in texts], ensure_ascii=False, indent=1)


@given(texts=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1), min_size=1))
def test_any_text_survives_json_and_csv(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("rows")
    for name, content in (
        ("a.jsonl", as_lines(texts)),
        ("a.json", as_array(texts)),
        ("lines.json", as_lines(texts)),
        ("a.csv", as_csv(texts)),
        ("a.tsv", as_csv(texts, "\t")),
    ):
        (folder / name).write_bytes(content.encode("utf-8-sig"))
        (folder / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
        for file in (folder / name, str(folder / f"{name}.gz")):
            assert texts_of(file) == texts, file


def test_compressed_text_and_byte_order_marks(tmp_path: Path) -> None:
    content = "Café, naïve.\r\nNext line.".encode("utf-8-sig")
    for name, packed in (
        ("a.txt", content),
        ("a.txt.gz", gzip.compress(content)),
        ("a.txt.bz2", bz2.compress(content)),
        ("a.txt.XZ", lzma.compress(content)),
        ("a.log", content),
    ):
        (tmp_path / name).write_bytes(packed)
        assert texts_of(tmp_path / name) == ["Café, naïve.\nNext line."]


def test_parquet_arrow_and_saved_datasets(tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict({"text": [*ODD, ""]})
    table.to_parquet(tmp_path / "a[1].parquet")
    table.save_to_disk(tmp_path / "saved")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    for source in (tmp_path / "a[1].parquet", arrow, tmp_path / "saved"):
        assert texts_of(source) == ODD


def test_a_local_dataset_is_streamed(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    datasets.Dataset.from_dict({"text": ["abc", "def"]}).to_parquet(tmp_path / "corpus" / "train.parquet")
    for name in ("default:train", "default", ":train"):
        assert texts_of(f"{tmp_path / 'corpus'}:{name}") == ["abc", "def"]


def test_a_row_keeps_the_keys_that_it_was_written_with(tmp_path: Path) -> None:
    chats = [[{"role": "user", "content": "a"}], [{"role": "tool", "content": "b", "name": "c", "when": "2020-01-01"}]]
    rows = [{"messages": chat} for chat in chats]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    for name in ("a.jsonl", "a.json"):
        assert list(read_rows(tmp_path / name, {"messages": list})) == rows


def test_an_empty_text_is_no_document_and_a_null_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": ""}\n\n{"text": "a"}\n')
    assert texts_of(file) == ["a"]
    assert list(read_rows(file, {"text": str})) == [{"text": ""}, {"text": "a"}]
    file.write_text('{"text": "a"}\n{"text": null}\n')
    with pytest.raises(CalibrationDataError, match=r"row 2 of .*a\.jsonl has no str 'text', only text \(NoneType\)\."):
        texts_of(file)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "a.jsonl",
            '{"text": "a"}\n{"txt": 1, "id": ""}',
            r"row 2 of .* no str 'text', only txt \(int\), id \(str\)\.",
        ),
        ("a.jsonl", '{"text": 5}', r"row 1 of .* has no str 'text', only text \(int\)\."),
        ("a.jsonl", "{}", r"row 1 of .* has no str 'text', only nothing\."),
        ("a.jsonl", '{"messages": []}', r"only messages \(list\)\. Chats need --chat-template"),
        ("a.jsonl", '["a"]', r"row 1 of .* has no str 'text', only a value \(str\)"),
        ("a.jsonl", '{"text": "a"}\n{', "line 2 of .*a.jsonl is not JSON: Expecting property name"),
        ("a.json", "[1", "line 1 of .*a.json is not JSON: Expecting ',' delimiter"),
        ("a.json", '[{"text": "a"}, 2]', r"row 2 of .*only a value \(int\)"),
        ("a.json", "[" * 100_000, "line 1 of .*a.json is not JSON: maximum recursion depth"),
        ("a.csv", "id,body\n1,a\n", r"row 1 of .* only id \(str\), body \(str\)\."),
        ("a.csv", "id,text\n1,a, b\n", "a.csv could not be read: a row has not as many fields as the header"),
        ("a.csv", "id,text\n1,b\n2\n", "a.csv could not be read after row 1: a row has not as many fields"),
        ("a.csv", 'text\n"a" b\n', "a.csv could not be read: ',' expected after '\"'"),
        ("a.parquet", "text", "a.parquet could not be read: .*Parquet"),
        ("a.parquet.gz", "text", r"a.parquet.gz is packed as \.gz\. Unpack it"),
        ("a.arrow", "text", "a.arrow could not be read"),
        ("a.jsonl", r'{"text": "\ud83d"}', r"a row of .* could not be read: it holds U\+D83D, which no text holds"),
        ("a.txt", b"a" * 8191 + b"\xe9 b", "a.txt is not UTF-8: .*byte 0xe9"),
        ("a.jsonl", b'{"text": "a"}\n\xe9', "a.jsonl is not UTF-8"),
        ("a.txt", "utf-16".encode("utf-16"), "a.txt is not UTF-8"),
        ("a.txt", "utf-16".encode("utf-16-le"), r"a.txt could not be read: it holds U\+0000, which no text holds"),
        ("a.zip", b"PK", r"a.zip is packed as \.zip\. Unpack it and give what is inside"),
        ("a.txt.gz", "no gzip", "a.txt.gz could not be read: Not a gzipped file"),
        ("a.txt.gz", gzip.compress(b"text " * 1000, mtime=0)[:30], "could not be read: Compressed file ended"),
        ("a.txt.xz", "no xz", "a.txt.xz could not be read"),
    ],
)
def test_what_is_wrong_is_one_line(name: str, content: str | bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(CalibrationDataError, match=words) as caught:
        texts_of(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_columns_of_other_types_in_parquet_are_named(tmp_path: Path) -> None:
    for name, values, found in (("a.parquet", [1, 2], "int"), ("b.parquet", [b"a"], "bytes")):
        datasets.Dataset.from_dict({"text": values}).to_parquet(tmp_path / name)
        with pytest.raises(CalibrationDataError, match=rf"row 1 of .* has no str 'text', only text \({found}\)"):
            texts_of(tmp_path / name)


def test_rows_of_a_file_without_a_known_suffix_are_lines_of_json(tmp_path: Path) -> None:
    (tmp_path / "chats.data").write_text('{"messages": []}\n\n{"messages": [1]}\n')
    assert [row["messages"] for row in read_rows(tmp_path / "chats.data", {"messages": list})] == [[], [1]]
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(CalibrationDataError, match=r"line 1 of .*a\.txt is not JSON: .*Give one object a line"):
        list(read_rows(tmp_path / "a.txt", {"messages": list}))


def test_json_may_hold_control_characters_and_other_line_ends(tmp_path: Path) -> None:
    text = "one\x0ctwo\tthree\u2028four\rfive"
    (tmp_path / "a.jsonl").write_text(f'{{"text": "{text}"}}\n', encoding="utf-8", newline="")
    assert texts_of(tmp_path / "a.jsonl") == [text]


def test_folders_hold_one_kind(tmp_path: Path) -> None:
    with pytest.raises(
        CalibrationDataError, match=r"holds no files of text, allowed: files of one of the kinds \.txt, \.jsonl"
    ):
        texts_of(tmp_path)
    (tmp_path / "b.jsonl").write_text(as_lines(["c"]))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(as_lines(["a", "b"]).encode()))
    (tmp_path / "README.md").write_text("It describes the others.")
    (tmp_path / ".hidden.txt").write_text("hidden")
    (tmp_path / "more").mkdir()
    assert texts_of(tmp_path) == ["a", "b", "c"]
    (tmp_path / "c.txt").write_text("d")
    with pytest.raises(CalibrationDataError, match=r"kinds '\.jsonl', '\.txt', allowed: files of one of"):
        texts_of(tmp_path)
    (tmp_path / "c.txt").rename(tmp_path / "c.pdf")
    with pytest.raises(CalibrationDataError, match=r"kinds '\.jsonl', '\.pdf', allowed: files of one of"):
        texts_of(tmp_path)


def test_names_that_are_none(tmp_path: Path) -> None:
    for source, words in (
        ("", "got an empty name"),
        ("no-such/dataset", "no-such/dataset could not be read: .*Give a file or a folder"),
        (tmp_path / "no.csv", "no.csv could not be read: .*No such file"),
        ("no.txt", "no.txt could not be read: .*No such file"),
        ("no.gz", "no.gz could not be read: .*No such file"),
        ("no.zip", "no.zip is packed as"),
        ("x" * 5000 + ".txt", "could not be read: .*too long"),
    ):
        with pytest.raises(CalibrationDataError, match=words) as caught:
            texts_of(source)
        assert "\n" not in str(caught.value)


def test_no_more_is_read_than_is_asked_for(tmp_path: Path) -> None:
    for name, unit in (("a.txt", "All that is read. "), ("a.jsonl", as_lines(["a"])), ("a.csv", "text\n" + "a\n" * 9)):
        with (tmp_path / name).open("wb") as handle:
            handle.write(unit.encode() * 30_000)
            handle.truncate(10**12)  # A sparse file: reading a terabyte of NUL would be noticed, and would be refused.
        block = next(next(read_documents(tmp_path / name)))
        assert len(block) <= BLOCK_CHARACTERS
        assert block.startswith("a" if name != "a.txt" else unit)


def test_text_json_and_csv_do_not_import_datasets(tmp_path: Path) -> None:
    for name, content in (("a.txt", "a"), ("a.jsonl", as_lines(["a"])), ("a.csv", as_csv(["a"]))):
        (tmp_path / name).write_text(content)
    program = f"""
import sys
from optimum_mla.io.documents import read_documents
for name in ("a.txt", "a.jsonl", "a.csv"):
    assert ["".join(document) for document in read_documents({str(tmp_path)!r} + "/" + name)] == ["a"]
assert "datasets" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
