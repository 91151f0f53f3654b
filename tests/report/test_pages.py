"""Pages made of a report, the HTML one also in a browser."""

from __future__ import annotations

import io
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from optimum_mla.measure.sizes import budget_rows
from optimum_mla.report.pages import html, markdown, terminal, write_pages
from optimum_mla.report.plots import COLOURS
from optimum_mla.report.render import cell
from optimum_mla.report.rows import BenchmarkReport, MemoryRow, QualityRow, SpeedRow, TaskRow

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


def report(name: str = "model <b>bold</b>", flagged: bool = True) -> BenchmarkReport:
    """A report with every kind of row."""
    memory = [
        MemoryRow(role, cache, context, 1, live * context, live * context, 100.0, 10**9, 10**9, 10**8)
        for role, cache, live in (("baseline", "default", 1000), ("model", "default", 250), ("model", "hqq-int4", 80))
        for context in (1024, 8192)
    ]
    memory[3] = MemoryRow(
        "model", "default", 8192, 1, 1.0, 2, 200.0, 1, 1, 10**8, ["alive | after a step"] if flagged else []
    )
    memory.append(MemoryRow("model", "default", 10**6, 1, problem="out of memory"))
    speed = [
        SpeedRow("baseline", "default", 1024, 1, 1000.0, 2.0, 50.0, 3.0, 40.0, None, None, 5, 10),
        SpeedRow("model", "default", 1024, 1, 900.0, 2.0, 75.0, 3.0, 30.0, 0.9, 1.5, 5, 10),
        SpeedRow("baseline", "default", 8192, 1, 800.0, 2.0, 40.0, 3.0, 60.0, None, None, 5, 10),
        SpeedRow("model", "default", 8192, 1, problem="out of memory"),
    ]
    quality = [
        QualityRow("baseline", "default", 10.0, scored_tokens=100),
        QualityRow("model", "default", 10.5, 95.25, 0.0123, 100),
        QualityRow("model", "hqq-int4", 10.625, 94.0, 0.015, 100),
    ]
    text = {"source": "book", "windows": 2, "tokens_per_window": 64, "stride_tokens": 50, "sha256": "0"}
    return BenchmarkReport(
        model=name,
        baseline="source",
        options={"batch_sizes": [1]},
        data={"eval-data": text},
        dtype="bfloat16",
        device="cpu",
        model_max_context_tokens=4096,
        memory_budget_bytes=10**9,
        memory=memory,
        budget=budget_rows(memory, 10**9),
        speed=speed,
        quality=quality,
        tasks=[TaskRow("model", "count", "acc", 0.5, 0.1)],
        threads=2,
    )


def test_sizes_are_short() -> None:
    assert [cell(v, "bytes") for v in (None, 7, 999.4, 1536, 10_600_000, 25_300_000_000, 2.5e13)] == [
        *("-", "7 B", "999 B", "1.54 kB", "10.6 MB", "25.3 GB", "25,000 GB")
    ]


def test_markdown_holds_every_table() -> None:
    text = markdown([("run", report())])
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "# run",
        *(
            f"## {name}"
            for name in ("Summary", "Memory", "What it buys", "Speed", "Quality", "Tasks", "What was measured")
        ),
    ]
    assert "| baseline | 1.00 kB | 100.0 | 4,096 (its limit) | 109 | 10.000 | - |" in text.replace("1 kB", "1.00 kB")
    assert "| 10.500 | 95.2 | 1.50 × at 1,024 |" in text or "| 10.500 | 95.3 | 1.50 × at 1,024 |" in text
    assert "alive \\| after a step" in text
    assert "| **model** |" in text  # flagged
    assert "out of memory" in text
    assert "windows of 64 tokens, stride 50" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.replace("\\|", "").count("|") > 2 for line in tables)


def table_of(text: str, title: str) -> list[list[str]]:
    """The cells of the table below a heading of a Markdown page, without the line under its header."""
    lines = text.split(f"## {title}\n")[1].split("\n## ")[0].splitlines()
    return [[part.strip() for part in line[1:-1].split("|")] for line in lines if line.startswith("| ")]


def test_columns_are_the_fields_with_a_value_in_their_units() -> None:
    text = markdown([("run", report())])
    header, first, *_ = table_of(text, "Speed")
    shown = dict(zip(header, first, strict=True))
    assert (shown["prefill tokens per second"], shown["prefill spread percent"]) == ("1,000.0", "2.00")
    assert (shown["attention percent of decode"], shown["decode ratio to baseline"]) == ("40.00", "-")
    assert table_of(text, "Quality")[0] == ["", "perplexity", "agreement percent", "kl nats", "scored tokens"]
    measured = replace(report(), quality=[QualityRow("model", "default", 10.5, 95.25, 0.0123, 100, None, 0.0014)])
    table = table_of(markdown([("run", measured)]), "Quality")
    assert table == [
        ["", "perplexity", "agreement percent", "kl nats", "scored tokens", "kl stderr nats"],
        ["model", "10.500", "95.25", "0.0123", "100", "0.0014"],
    ]
    assert table_of(text, "Tasks")[1] == ["model", "count", "acc", "0.5000", "0.1000"]
    (budget,) = [row for row in table_of(text, "What it buys") if row[0] == "baseline"]
    assert budget[:5] == ["baseline", "1,000", "0 B", "100 MB", "900,000"]


def test_only_what_was_measured_is_shown() -> None:
    empty = replace(report(), data={}, memory=[], budget=[], speed=[], quality=[], tasks=[])
    text = markdown([("run", empty)])
    assert "## Memory" not in text
    assert "## What was measured" in text
    assert "<svg" not in html([("run", empty)])


def test_the_terminal_shows_the_summary() -> None:
    lines = terminal([("run", report())]).splitlines()
    header = "cache/token % of baseline longest context batch at 8k perplexity agreement % decoding"
    assert " ".join(lines[0].split()) == header
    assert len(lines) == 8
    assert lines[-1].endswith("It decodes as fast as the source from 1,024 tokens on (1.50 × at 1,024).")
    assert lines[-2].startswith(
        "The model with the cache hqq-int4 keeps 8.0 % of the source's bytes per token for +6.2 %"
    )


def test_formats_are_as_asked(tmp_path: Path) -> None:
    write_pages([("run", report())], tmp_path, ("json",))
    assert list(tmp_path.iterdir()) == []
    write_pages([("run", report())], tmp_path, ("md", "html"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.md"]


def test_pages_are_the_same_every_time() -> None:
    assert html([("run", report())]) == html([("run", report())])


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_diverged_model_has_its_pages(value: float, tmp_path: Path) -> None:
    broken = replace(report(), quality=[QualityRow("model", "default", value, 0.0, value, 10)], interrupted=True)
    write_pages([("run", broken)], tmp_path, ("md", "html"))
    assert str(value) in (tmp_path / "report.md").read_text()
    assert "interrupted" in (tmp_path / "report.html").read_text()


def test_text_of_a_report_is_no_markup() -> None:
    assert "<b>bold</b>" not in html([("<b>bold</b>", report())])


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    if BROWSER is None:
        pytest.skip("no Chromium on this machine")
    sync_playwright = pytest.importorskip("playwright.sync_api").sync_playwright
    with sync_playwright() as playwright:
        instance = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield instance
        instance.close()


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 375, 1200])
def test_the_page_in_a_browser(browser: Any, width: int, scheme: str, several: bool, tmp_path: Path) -> None:
    reports = [("one", report()), ("two", report("another", flagged=False))][: 2 if several else 1]
    write_pages(reports, tmp_path, ("html",))
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    complaints: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto((tmp_path / "report.html").as_uri())
    assert complaints == []
    assert requests == [(tmp_path / "report.html").as_uri()]
    assert page.locator("h1").inner_text() == ("2 reports compared" if several else "one")
    assert page.locator("main > section").first.locator("h2").inner_text() == "Summary"
    assert page.locator("table").count() == 6
    assert page.locator("figure svg").count() == 3
    assert page.locator("tr.flagged").count() == 2
    # Wide tables scroll inside their frames; the page does not.
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("[...document.querySelectorAll('svg')].every(s => s.getBoundingClientRect().width > 200)")

    def channel(property_: str, selector: str) -> float:
        value = page.evaluate(f"getComputedStyle(document.querySelector('{selector}')).{property_}")
        return sum(float(part) for part in value.strip("rgba()").split(",")[:3]) / 3

    background, text = channel("backgroundColor", "body"), channel("color", "body")
    assert (background > 200) == (scheme == "light")
    assert abs(background - text) > 150
    label = page.evaluate("getComputedStyle(document.querySelector('svg text')).fill")
    ink = sum(float(part) for part in label.strip("rgba()").split(",")[:3]) / 3
    assert abs(background - ink) > 150
    with Image.open(io.BytesIO(page.screenshot(full_page=True))) as shot:
        assert shot.width == width
        page_colour, *others = sorted(shot.convert("RGB").getcolors(2**24) or [], reverse=True)
    # Mostly page, but with ink, and the colours of the plots' lines.
    assert page_colour[0] < 0.98 * sum(count for count, _ in [page_colour, *others])
    wanted = [tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) for colour in COLOURS[:2]]
    assert {colour for _, colour in others}.issuperset(wanted)
    page.close()


def test_every_plot_has_its_own_names(browser: Any, tmp_path: Path) -> None:
    write_pages([("one", report())], tmp_path, ("html",))
    page = browser.new_page()
    page.goto((tmp_path / "report.html").as_uri())
    clips = page.evaluate("[...document.querySelectorAll('clipPath')].map(e => e.id)")
    assert len(clips) == len(set(clips)) == 3
    page.close()
