"""A journal gives back what was written, whatever became of its last line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_mla.core.errors import OutputError
from optimum_mla.io.journal import Journal, differing_names

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(entries=st.dictionaries(st.text(), VALUES, min_size=1), cut=st.integers(1, 200))
def test_all_whole_lines_come_back(tmp_path_factory, entries: dict, cut: int) -> None:
    path: Path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    journal = Journal(path)
    for key, value in entries.items():
        journal.add(key, value)
    assert Journal(path).entries == journal.entries == entries

    written = path.read_bytes()
    last = written.splitlines(keepends=True)[-1]
    path.write_bytes(written[: -min(cut, len(last))])
    again = Journal(path)
    assert list(again.entries) == list(entries)[:-1]
    again.add("more", 1)
    assert Journal(path).entries == {**again.entries, "more": 1}


def test_a_later_line_replaces_an_earlier_one_and_numbers_stay_as_they_are(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    for value in (1, 0.1 + 0.2, math.inf):
        journal.add("error", value)
    assert Journal(tmp_path / "journal.jsonl").entries == {"error": math.inf}
    assert len((tmp_path / "journal.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    "damage",
    [
        b"\0" * 40,
        b"\0\0\0{",
        b"\xff\xfe\x00",
        b'{"key": "layer 1", "val',
        b"[1, 2]",
        b"7",
        b'{"key": "layer 1"}',
        b'{"key": ["layer 1"], "value": 1}',
        b"[" * 100_000,
    ],
)
def test_a_journal_is_read_up_to_its_first_damaged_line_which_is_said(
    damage: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "journal.jsonl"
    lines = [json.dumps({"key": f"layer {number}", "value": number}).encode() for number in range(3)]
    path.write_bytes(b"\n".join([lines[0], damage, lines[2]]) + b"\n")
    journal = Journal(path)
    assert journal.entries == {"layer 0": 0}
    (said,) = caplog.messages
    assert said == f"warning: {path} is damaged from line 2 on. What it said from there on is done again."
    journal.add("layer 1", "anew")
    assert Journal(path).entries == {"layer 0": 0, "layer 1": "anew"}
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    ("given", "other"),
    [
        ((0, 1), (0, 2)),
        ([(0, 1), {"a": (2,)}], [(0, 1), {"a": (3,)}]),
        (Path("a") / "b", Path("a")),
        (torch.bfloat16, torch.float16),
        (torch.device("cuda", 1), torch.device("cuda", 0)),
        (math.nan, 0.0),
        (-math.inf, math.inf),
        ({1: "a"}, {2: "a"}),
        (0.1 + 0.2, 0.3),
    ],
)
def test_a_value_equals_what_a_journal_kept_of_it(given: Any, other: Any, tmp_path: Path) -> None:
    Journal(tmp_path / "journal.jsonl").add("options", {"one": given, "same": 1})
    kept = Journal(tmp_path / "journal.jsonl").entries["options"]
    assert differing_names(kept, {"one": given, "same": 1}) == []
    assert differing_names(kept, {"one": kept["one"], "same": 1.0}) == []
    assert differing_names(kept, {"one": other, "same": 1}) == ["one"]
    assert differing_names(kept, {"more": 0, "one": given}) == ["more", "same"]


def test_a_file_that_cannot_be_read_or_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"output: .* cannot be written: Is a directory"):
        Journal(tmp_path)
    with pytest.raises(OutputError, match=r"output: .*journal\.jsonl cannot be written: No such file"):
        Journal(tmp_path / "missing" / "journal.jsonl").add("layer 0", 0)
