"""The text that comes with the package is a mixture, and is enough for a conversion with default options."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from optimum_mla.calibrate import BUILT_IN_TEXT, built_in_windows
from optimum_mla.core.errors import CalibrationDataError

REFERENCE = Path(__file__).resolve().parents[2] / "benchmarks" / "reference_model"


def test_every_passage_names_its_source_and_all_kinds_come_early() -> None:
    with lzma.open(BUILT_IN_TEXT, "rt", encoding="utf-8") as handle:
        rows = [json.loads(line) for line in handle]
    assert all(row["source"] and len(row["text"]) > 200 for row in rows)
    assert all("public domain" in row["source"] or "Apache-2.0" in row["source"] for row in rows)
    kinds = ("Universal Declaration", "sqlite3.h", "chats.txt", "walden")
    early = [row["source"] for row in rows[: len(rows) // 8]]
    assert all(any(kind in source for source in early) for kind in kinds)
    assert len({row["source"] for row in rows if "Universal Declaration" in row["source"]}) == 30


def test_it_fills_the_default_windows() -> None:
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    windows = built_in_windows(tokenizer, length=512, samples=128)
    assert windows.shape == (128, 512)
    assert tokenizer.decode(windows[0]).startswith("I did not read books the first summer")
    assert len(built_in_windows(tokenizer, length=4096, samples=999)) > 20
    with pytest.raises(CalibrationDataError, match="shorter than one window of 1000000 tokens"):
        built_in_windows(tokenizer, length=1_000_000, samples=1)


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"


def test_a_chat_model_is_calibrated_on_chats_too() -> None:
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    tokenizer.chat_template = TEMPLATE
    windows = [tokenizer.decode(ids) for ids in built_in_windows(tokenizer, length=256, samples=100)]
    begun = [text for text in windows if text.startswith("<user>")]
    assert 20 < len(begun) < 80
    assert any("<user>Why does bread rise?</user><assistant>Yeast eats the sugars" in text for text in windows)
    assert any("<user>Go on with this text:\n\nDéclaration universelle" in text for text in windows)
    assert not any("Question: " in text for text in windows)
    tokenizer.chat_template = "{{ raise_exception('no chats') }}"
    plain = AutoTokenizer.from_pretrained(REFERENCE)
    assert built_in_windows(tokenizer, 256, 9).equal(built_in_windows(plain, 256, 9))
