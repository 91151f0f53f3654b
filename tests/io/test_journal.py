"""A journal gives back what was written, whatever became of its last line."""

from __future__ import annotations

import math
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from optimum_mla.io.journal import Journal

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
