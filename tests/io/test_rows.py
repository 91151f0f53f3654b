"""Rows of every format hold the same values, and what is wrong with one is named."""

from __future__ import annotations

import csv
import gzip
import io
import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimum_mla.core.errors import CalibrationDataError
from optimum_mla.io.documents import read_chats, read_documents
from optimum_mla.io.rows import read_rows

ODD = ["a\u2028b\u0085c\u2029d", "None", "5", "2020-01-01", 'with "quotes", commas\nand lines', "漢字"]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    datasets.disable_progress_bars()


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
            assert ["".join(document) for document in read_documents(file)] == texts, file


def test_control_characters_inside_strings_are_taken(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a\x0cb"}\n\x0c\n{"text": "c\x1cd"}\r\n')
    assert [row["text"] for row in read_rows(tmp_path / "a.jsonl", {"text": str})] == ["a\x0cb", "c\x1cd"]


def test_parquet_arrow_and_saved_datasets(tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict({"text": [*ODD, "", None]})
    table.to_parquet(tmp_path / "a[1].parquet")
    table.save_to_disk(tmp_path / "saved")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    for source in (tmp_path / "a[1].parquet", arrow, tmp_path / "saved"):
        assert ["".join(document) for document in read_documents(source)] == ODD


def test_a_row_keeps_the_keys_that_it_was_written_with(tmp_path: Path) -> None:
    chats = [[{"role": "user", "content": "a"}], [{"role": "tool", "content": "b", "name": "c", "when": "2020-01-01"}]]
    for name in ("a.jsonl", "a.json"):
        rows = [{"messages": chat} for chat in chats]
        (tmp_path / name).write_text(json.dumps(rows) if name == "a.json" else "\n".join(map(json.dumps, rows)))
        assert list(read_chats(tmp_path / name)) == chats


def test_empty_rows_are_left_out_where_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n\n{"text": null}\n{"text": "a"}\n')
    assert list(read_rows(tmp_path / "a.jsonl", {"text": str}, skip_empty=True)) == [{"text": "a"}]
    with pytest.raises(CalibrationDataError, match=r"line 3 of .* has no str 'text': the value is null"):
        list(read_rows(tmp_path / "a.jsonl", {"text": str}))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"text": "a"}\n{"txt": 1, "id": 2}', r"line 2 of .* no str 'text'. .* columns only: txt, id\."),
        ("a.jsonl", '{"text": 5}', "line 1 of .* has no str 'text': the value is of type int"),
        ("a.jsonl", '{"messages": []}', "columns only: messages. Chats need --chat-template"),
        ("a.jsonl", '["a"]', "line 1 of .* is no object with columns, but a list"),
        ("a.jsonl", '{"text": "a"}\n{', "line 2 of .* is not JSON: .*Give one object per line"),
        ("a.json", "[1", "a.json is not JSON"),
        ("a.json", '[{"text": "a"}, 2]', "row 2 of .* but a int"),
        ("a.json", "[" * 100_000, "a.json is not JSON"),
        ("a.csv", "id,body\n1,a\n", r"columns only: id, body\."),
        ("a.csv", "id,text\n1,a, b\n", "line 2 of .* has not as many fields as the header"),
        ("a.csv", "id,text\n1\n", "line 2 of .* has not as many fields as the header"),
        ("a.csv", 'text\n"a" b\n', "a.csv is not CSV near line 2"),
        ("a.parquet", "text", r"a.parquet is no readable \.parquet file"),
        ("a.arrow", "text", r"a.arrow is no readable \.arrow file"),
        ("a.parquet.gz", "text", r"compressed \.parquet file. Decompress it first"),
        ("a.jsonl", r'{"text": "\ud83d"}', r"holds U\+D83D"),
    ],
)
def test_what_is_wrong_is_one_line(name: str, content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CalibrationDataError, match=words) as caught:
        [list(document) for document in read_documents(tmp_path / name)]
    assert "\n" not in str(caught.value)


def test_columns_of_other_types_in_parquet_are_named(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": [1, 2]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(CalibrationDataError, match=r"row 1 of .* has no str 'text': the value is of type int"):
        list(read_documents(tmp_path / "a.parquet"))
    (tmp_path / "corpus").mkdir()
    datasets.Dataset.from_dict({"text": [b"a"]}).to_parquet(tmp_path / "corpus" / "train.parquet")
    with pytest.raises(CalibrationDataError, match=r"row 1 of dataset .* the value is of type bytes"):
        list(read_documents(f"{tmp_path / 'corpus'}:default"))


def test_folders_hold_one_kind(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text(as_lines(["c"]))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(as_lines(["a", "b"]).encode()))
    (tmp_path / "README.md").write_text("It describes the others.")
    (tmp_path / ".hidden.txt").write_text("hidden")
    assert ["".join(document) for document in read_documents(tmp_path)] == ["a", "b", "c"]
    (tmp_path / "c.txt").write_text("d")
    with pytest.raises(CalibrationDataError, match=r"several kinds \(2 \.jsonl, 1 \.txt\)"):
        list(read_documents(tmp_path))


def test_names_that_are_none(tmp_path: Path) -> None:
    for source, words in (
        ("", "empty name"),
        ("a:b:c:d", "NAME:CONFIG:SPLIT"),
        (tmp_path / "no.csv", "there is no file"),
        ("x" * 5000 + ".txt", "there is no file"),
        ("/dev/null", "no regular file"),
    ):
        with pytest.raises(CalibrationDataError, match=words):
            list(read_documents(source))


def test_what_needs_datasets_says_so_and_the_rest_does_not_need_it(tmp_path: Path) -> None:
    for name, content in (("a.txt", "a"), ("a.jsonl", as_lines(["a"])), ("a.csv", as_csv(["a"])), ("a.parquet", "")):
        (tmp_path / name).write_text(content)
    program = f"""
import sys
sys.modules["datasets"] = None
from optimum_mla.core.errors import MissingDependencyError
from optimum_mla.io.documents import read_documents
for name in ("a.txt", "a.jsonl", "a.csv"):
    assert ["".join(d) for d in read_documents({str(tmp_path)!r} + "/" + name)] == ["a"]
for source in ({str(tmp_path)!r} + "/a.parquet", "some/corpus"):
    try:
        list(read_documents(source))
    except MissingDependencyError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all("datasets is needed to read" in line and "optimum-mla[train]" in line for line in lines)
