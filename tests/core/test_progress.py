"""What a log file says while work goes on."""

from __future__ import annotations

import pytest

from optimum_mla.core import progress as module
from optimum_mla.core.progress import progress


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
