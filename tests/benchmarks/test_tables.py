"""The numbers that README and docs show are those of the committed results."""

from __future__ import annotations

import re

import pytest

from benchmarks import tables
from benchmarks.result import ROOT


@pytest.mark.parametrize("page", tables.pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_show_the_committed_results(page: object) -> None:
    text = page.read_text(encoding="utf-8")  # type: ignore[attr-defined]
    assert tables.rendered(text) == text, "Run `make tables`."


def test_every_block_is_on_a_page_once() -> None:
    found = [name for page in tables.pages() for name in tables.BLOCK.findall(page.read_text(encoding="utf-8"))]
    assert sorted(found) == sorted(tables.BLOCKS)
    markers = sum(page.read_text(encoding="utf-8").count("<!-- results: ") for page in tables.pages())
    assert markers == len(found)


@pytest.mark.parametrize("name", tables.BLOCKS)
def test_a_number_that_was_changed_by_hand_is_set_right(name: str) -> None:
    whole = tables.rendered(f"<!-- results: {name} -->\n<!-- end of results -->")
    changed = re.sub(r"\d+\.\d", "0.0", whole)
    assert changed != whole
    assert tables.rendered(changed) == whole


def test_numbers_follow_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    found = tables.result("recovery_2m")
    found["runs"][0]["percent_of_excess_closed"] = 12.34
    monkeypatch.setattr(tables, "result", lambda name: found)
    assert tables.recovery_2m().splitlines()[2].endswith("| 12.3 % |")


def test_a_block_without_a_renderer_is_an_error() -> None:
    with pytest.raises(KeyError, match="unheard_of"):
        tables.rendered("<!-- results: unheard_of -->\n<!-- end of results -->")
