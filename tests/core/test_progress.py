"""What a log file says while work goes on."""

from __future__ import annotations

import pytest

from optimum_mla.core import progress as module
from optimum_mla.core.progress import expected_to_take, progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands at the last number of the list."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[-1])
    return now


def said(clock: list[float], capsys: pytest.CaptureFixture[str], seconds: float, main: bool, sized: bool) -> list[str]:
    """The lines on standard error for four items that take so many seconds each."""
    items = [1, 2, 3, 4] if sized else iter([1, 2, 3, 4])
    seen = []
    for item in progress(items, "layers", main=main):
        seen.append(item)
        clock.append(clock[-1] + seconds)
    assert seen == [1, 2, 3, 4]
    return capsys.readouterr().err.splitlines()


def test_the_main_work_gives_a_line_an_item(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    assert said(clock, capsys, 5, main=True, sized=True) == [
        "layers: 1 of 4, 5 s, about 15 s left",
        "layers: 2 of 4, 10 s, about 10 s left",
        "layers: 3 of 4, 15 s, about 5 s left",
        "layers: 4 of 4, 20 s",
    ]
    assert said(clock, capsys, 0.5, main=True, sized=True) == []


def test_other_work_gives_a_line_each_half_minute(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["layers: 2 of 4, 32 s, about 32 s left", "layers: 4 of 4, 64 s"]
    assert said(clock, capsys, 16, main=False, sized=True) == lines
    lines = ["layers: 1, 31 s", "layers: 2, 62 s", "layers: 3, 93 s", "layers: 4, 124 s"]
    assert said(clock, capsys, 31, main=False, sized=False) == lines


def test_stages_say_what_is_left_of_all_of_them(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with expected_to_take(60):
        first = said(clock, capsys, 5, main=True, sized=True)
        second = said(clock, capsys, 20, main=True, sized=True)  # longer than was expected
    assert first == [
        "layers: 1 of 4, 5 s, about 15 s left here, 55 s in all",
        "layers: 2 of 4, 10 s, about 10 s left here, 50 s in all",
        "layers: 3 of 4, 15 s, about 5 s left here, 45 s in all",
        "layers: 4 of 4, 20 s",
    ]
    assert second[0] == "layers: 1 of 4, 20 s, about 60 s left here, 60 s in all"
    assert said(clock, capsys, 5, main=True, sized=True)[0] == "layers: 1 of 4, 5 s, about 15 s left"
