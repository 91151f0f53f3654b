"""The text that comes with the package is a mixture, and is enough for a conversion with default options."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

from transformers import AutoTokenizer

from optimum_mla.calibrate import BUILT_IN_TEXT
from optimum_mla.text import token_windows

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
    windows = token_windows(tokenizer, str(BUILT_IN_TEXT), length=512, samples=128)
    assert windows.shape == (128, 512)
