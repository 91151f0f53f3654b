"""The pages `report.md` and `report.html`, which show one or several benchmark reports as tables and plots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from optimum_mla.report.comparison import benchmark_verdict, break_even
from optimum_mla.report.plots import benchmark_plots
from optimum_mla.report.render import Table, cell, fill, size
from optimum_mla.report.rows import BASELINE, BenchmarkReport

FORMATS = ("json", "md", "html")
Named = Sequence[tuple[str, BenchmarkReport]]
"""Reports with the names by which their rows are told apart."""
NOTES = {
    "memory": "Live bytes are those of all tensors that the cache object holds after a step, each whole storage "
    "counted once. Peaks are those of the whole process (on CUDA: of the allocator). Each row was measured in a "
    "process of its own.",
    "budget": "Computed from the measured bytes for {budgets} minus the weights. Activations are not counted.",
    "speed": "Medians of tokens per second, all rows together. Spreads are distances between the quartiles in percent "
    "of the median. The baseline was timed in turn in the same process. Loading, tokenizing and sampling are not "
    "timed. Attention is the share of a decoding step that its modules take, projections included.",
    "quality": "One token at a time through the live cache, in {windows}. Only the last tokens of a window are scored. "
    "Standard errors are those over the windows; that of the loss is of its difference to the baseline's.",
    "tasks": "Measured by lm_eval. Generated answers come through the model's own cache. Given answers are scored in "
    "one pass with their question, which does not read quantized tokens.",
}
"""The tables after the summary, by the field of a report whose rows they show, and what they show."""
TITLES = {"budget": "What it buys"}
"""Titles of tables that are not those of their fields."""
FORMS = {"bytes": "bytes", "tokens": ",", "percent": ".2f", "nats": ".4f", "second": ",.1f", "baseline": ".2f"}
FORMS |= {"token": ",.0f", "perplexity": ".3f", "batch": ",", "value": ".4f", "stderr": ".4f"}
"""How cells show a number, by the last of these words in the name of its field, which is its unit."""
HIDDEN = ("role", "cache", "flags", "problem")
"""Fields that are no columns of their own: they are in the first and in the last column."""


def write_pages(reports: Named, folder: Path, formats: Iterable[str]) -> None:
    """Write the pages that `formats` names; `json` is ignored, because the report itself writes it."""
    if "md" in formats:
        (folder / "report.md").write_text(markdown(reports), encoding="utf-8")
    if "html" in formats:
        (folder / "report.html").write_text(html(reports), encoding="utf-8")


def terminal(reports: Named) -> str:
    """Return the summary and the verdict as plain text for a terminal."""
    table = summary(reports)
    return "\n".join([str(table), table.note, *_verdicts(reports)])


def markdown(reports: Named) -> str:
    """Return the content of `report.md`."""
    return fill("report.md", **_content(reports))


def html(reports: Named) -> str:
    """Return the content of `report.html`, which holds its styles and plots and loads nothing."""
    return fill("report.html", plots=benchmark_plots(_titled(reports)), **_content(reports))


def _content(reports: Named) -> dict[str, Any]:
    """Return what both pages show: the heading, the verdicts, the tables that have rows, and what was measured."""
    return {
        "heading": reports[0][0] if len(reports) == 1 else f"{len(reports)} reports compared",
        "verdicts": _verdicts(reports),
        "tables": [table for table in (summary(reports), *_tables(reports)) if table.rows],
        "facts": _facts(reports),
    }


def _titled(reports: Named) -> list[tuple[str, BenchmarkReport]]:
    """Return the reports, each with what goes in front of its lines: its name where there are several."""
    return [(f"{name}: " if len(reports) > 1 else "", report) for name, report in reports]


def _verdicts(reports: Named) -> list[str]:
    """Return the verdict and the break-even of each report that has them."""
    found = [
        (title, text) for title, report in _titled(reports) for text in (benchmark_verdict(report), break_even(report))
    ]
    return [title + text for title, text in found if text]


def _budgets(reports: Named) -> str:
    return ", ".join(dict.fromkeys(size(report.memory_budget_bytes) for _, report in reports))


def summary(reports: Named) -> Table:
    """Return the summary, which has one line for each model and cache."""
    lines: list[tuple[str, ...]] = []
    flagged: set[int] = set()
    for title, report in _titled(reports):
        budget, quality = {row.key: row for row in report.budget}, {row.key: row for row in report.quality}
        own = budget.get((BASELINE, "default"))
        rows = {row.key: row for row in (*report.budget, *report.quality, *report.speed)}
        for key in sorted(rows, key=lambda key: key[0] != BASELINE):
            fits, scored = budget.get(key), quality.get(key)
            timed = [row for row in report.speed if row.key == key and row.problem is None]
            last = max(timed, key=lambda row: (row.context_tokens, -row.batch_size), default=None)
            ratio = None if last is None else last.decode_ratio_to_baseline
            if any(row.flags for row in report.memory if row.key == key):
                flagged.add(len(lines))
            lines.append(
                (
                    title + rows[key].name,
                    cell(fits and fits.cache_bytes_per_token, "bytes"),
                    cell(100 * fits.shared_bytes / own.shared_bytes if fits and own else None, ".1f"),
                    "-" if fits is None else _context(fits.longest_context_tokens, report.model_max_context_tokens),
                    cell(fits and fits.largest_batch, ","),
                    cell(scored and scored.perplexity, ".3f"),
                    cell(scored and scored.agreement_percent, ".1f"),
                    "-" if ratio is None or last is None else f"{ratio:.2f} × at {last.context_tokens:,}",
                )
            )
    note = (
        "Longest context (batch 1) and largest batch (8192 tokens a row) that fit "
        f"{_budgets(reports)} beside the weights."
    )
    if any(report.dtype == "float32" for _, report in reports):
        note += " Shares count numbers in 16 bits, also those that a float32 model keeps in 32."
    columns = ",cache/token,% of baseline,longest context,batch at 8k,perplexity,agreement %,decoding"
    return Table(columns.split(","), lines, "Summary", note, frozenset(flagged))


def _context(fitting: int, limit: int | None) -> str:
    """Return the longest context that fits, or the model's own limit if that is shorter."""
    return f"{fitting:,}" if limit is None or fitting <= limit else f"{limit:,} (its limit)"


def _tables(reports: Named) -> Iterable[Table]:
    """Yield a table for each list of rows that is not empty, with a column for each field that some row has."""
    texts = [report.data["eval-data"] for _, report in reports if report.data]
    windows = [f"windows of {text['tokens_per_window']} tokens, stride {text['stride_tokens']}" for text in texts]
    said = {"budgets": _budgets(reports), "windows": "; ".join(dict.fromkeys(windows))}
    for field, note in NOTES.items():
        found = [(title, row) for title, report in _titled(reports) for row in getattr(report, field)]
        measured = [one.name for one in fields(found[0][1]) if one.name not in HIDDEN] if found else []
        measured = [name for name in measured if any(getattr(row, name) is not None for _, row in found)]
        flags = [getattr(row, "flags", []) for _, row in found]
        notes = [getattr(row, "problem", None) or "; ".join(why) for (_, row), why in zip(found, flags, strict=True)]
        forms = {name: ["", *(FORMS[word] for word in name.split("_") if word in FORMS)][-1] for name in measured}
        rows = [
            [title + row.name, *(cell(getattr(row, name), form) for name, form in forms.items())]
            for title, row in found
        ]
        header = ["", *(name.replace("_", " ") for name in measured)]
        if any(notes):
            header.append("note")
            rows = [[*row, note] for row, note in zip(rows, notes, strict=True)]
        marked = frozenset(index for index, why in enumerate(flags) if why)
        if found:
            yield Table(header, rows, TITLES.get(field, field.capitalize()), note.format(**said), marked)


def _facts(reports: Named) -> list[tuple[str, str]]:
    """Return what was measured and on which machine, as names and texts."""
    found = []
    for title, report in _titled(reports):
        limit = report.model_max_context_tokens
        found += [
            (f"{title}model", report.model + (f", with contexts of up to {limit:,} tokens" if limit else "")),
            (f"{title}baseline", report.baseline or "none"),
            (f"{title}machine", f"{report.machine}, {report.device}, {report.threads} threads, {report.dtype}"),
            (f"{title}versions", ", ".join(f"{name} {what}" for name, what in report.versions.items())),
        ]
        if report.interrupted:
            found.append((f"{title}interrupted", "the run was stopped, and this is what had been measured before"))
    return found
