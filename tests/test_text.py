"""Reading text and cutting it into windows."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoTokenizer

from optimum_mla.errors import CalibrationDataError
from optimum_mla.text import read_chats, read_documents, token_windows

REFERENCE = Path(__file__).resolve().parents[1] / "benchmarks" / "reference_model"


class Letters:
    """A tokenizer: one token a character."""

    def __call__(self, text: str, **options: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


def test_windows_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefghij", encoding="utf-8")
    windows = token_windows(Letters(), tmp_path / "a.txt", length=4)
    assert ["".join(map(chr, row)) for row in windows.tolist()] == ["abcd", "efgh"]
    assert token_windows(Letters(), str(tmp_path / "a.txt"), length=4, samples=1).shape == (1, 4)
    assert token_windows(Letters(), tmp_path / "a.txt", length=4, samples=9).shape == (2, 4)


def test_windows_run_over_the_files_of_a_folder_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("def")
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "ignored.md").write_text("xyz")
    assert "".join(map(chr, token_windows(Letters(), tmp_path, length=6)[0].tolist())) == "abcdef"


def test_windows_of_token_ids() -> None:
    assert torch.equal(token_windows(None, range(7), length=3), torch.arange(6).view(2, 3))


def test_a_local_dataset_is_streamed(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    datasets.Dataset.from_dict({"text": ["abc", "def"]}).to_parquet(folder / "train.parquet")
    (tmp_path / "wrong").mkdir()
    datasets.Dataset.from_dict({"body": ["abc"]}).to_parquet(tmp_path / "wrong" / "train.parquet")
    assert list(read_documents(f"{folder}:default:train")) == ["abc", "def"]
    with pytest.raises(CalibrationDataError, match="only: body"):
        list(read_documents(f"{tmp_path / 'wrong'}:default"))


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "none").mkdir()
    for source, words in (
        (tmp_path / "latin.txt", "not UTF-8"),
        (tmp_path / "empty.txt", "0 tokens"),
        (tmp_path / "none", r"no \*\.txt"),
        (tmp_path / "missing.txt", "no file"),
        ("no-such/dataset", "did not load as a dataset"),
    ):
        with pytest.raises(CalibrationDataError, match=words):
            token_windows(Letters(), source, length=2)
    with pytest.raises(CalibrationDataError, match=r"eval-data: .* fewer than one sample of 9"):
        token_windows(Letters(), [1, 2], length=9, field="eval-data")


CHATS = [[{"role": "user", "content": "Who is there?"}], [{"role": "user", "content": "I."}]]


def test_chats_are_rendered_by_the_template(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
    lines = [json.dumps({"messages": chat}) for chat in CHATS]
    (tmp_path / "chats.jsonl").write_text("\n".join([lines[0], "", lines[1]]))
    datasets.Dataset.from_dict({"messages": CHATS}).to_parquet(tmp_path / "corpus" / "train.parquet")
    for source in (str(tmp_path / "chats.jsonl"), f"{tmp_path / 'corpus'}:default"):
        assert list(read_chats(source)) == CHATS
        windows = token_windows(tokenizer, source, length=3, chats=True)
        rendered = "user: Who is there? user: I. "
        assert rendered.startswith(tokenizer.decode(windows.flatten()))
        assert len(windows) >= 3


def test_chats_that_cannot_be_rendered_are_named(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    good = tmp_path / "good.jsonl"
    good.write_text(json.dumps({"messages": CHATS[0]}))
    with pytest.raises(CalibrationDataError, match="tokenizer has none"):
        token_windows(tokenizer, good, length=3, chats=True)
    tokenizer.chat_template = "{{ raise_exception('no roles') }}"
    with pytest.raises(CalibrationDataError, match="does not render: no roles"):
        token_windows(tokenizer, good, length=3, chats=True)
    with pytest.raises(CalibrationDataError, match="token ids"):
        token_windows(tokenizer, [1, 2, 3], length=3, chats=True)
    for text, words in (("{", "line 1 .* not JSON"), ('{"text": "a"}', "line 1 .* no list 'messages'")):
        bad = tmp_path / "bad.jsonl"
        bad.write_text(text)
        with pytest.raises(CalibrationDataError, match=words):
            list(read_chats(bad))
