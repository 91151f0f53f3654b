"""The pages `report.md` and `report.html`, which show one or several benchmark reports as tables and plots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from optimum_mla.report.comparison import break_even, verdict
from optimum_mla.report.render import number, table
from optimum_mla.report.rows import BASELINE, BenchmarkReport

FORMATS = ("json", "md", "html")
Named = Sequence[tuple[str, BenchmarkReport]]
"""Reports with the names by which their rows are told apart."""


@dataclass(frozen=True)
class Section:
    """A table of a page.

    Attributes:
        title: Heading above the table.
        note: A sentence on what the table shows.
        header: Names of the columns.
        rows: Cells of the rows.
        flagged: Indices of the rows that a reader must look at.
    """

    title: str
    note: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    flagged: frozenset[int] = frozenset()


def write_pages(reports: Named, folder: Path, formats: Iterable[str]) -> None:
    """Write the pages that `formats` names; `json` is ignored, because the report itself writes it."""
    if "md" in formats:
        (folder / "report.md").write_text(markdown(reports), encoding="utf-8")
    if "html" in formats:
        (folder / "report.html").write_text(html(reports), encoding="utf-8")


def size(value: float | None) -> str:
    """Return a number of bytes in decimal units with three digits, such as `1.54 GB`, or `-` for None."""
    if value is None:
        return "-"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}" if value < 1000 * scale else f"{value / scale:,.0f} {unit}"
    return f"{value:.0f} B"


def label(role: str, cache: str) -> str:
    """Return the name of a model with its cache in a table."""
    return role if cache == "default" else f"{role}, {cache}"


def sections(reports: Named) -> list[Section]:
    """Return all tables that have rows, the summary first."""
    made = [summary(reports), memory(reports), budget(reports), speed(reports), quality(reports), tasks(reports)]
    return [section for section in made if section.rows]


def _rows(reports: Named, name: str) -> list[tuple[str, BenchmarkReport, Any]]:
    """Return the rows of one field of all reports, each with its report and the prefix that tells reports apart."""
    several = len(reports) > 1
    return [
        (f"{title}: " if several else "", report, row) for title, report in reports for row in getattr(report, name)
    ]


def summary(reports: Named) -> Section:
    """Return the summary, which has one line for each model and cache."""
    lines: list[tuple[str, ...]] = []
    flagged: set[int] = set()
    for title, report in reports:
        keys = [(row.role, row.cache) for rows in (report.budget, report.quality, report.speed) for row in rows]
        own = next((row for row in report.budget if (row.role, row.cache) == (BASELINE, "default")), None)
        for role, cache in sorted(dict.fromkeys(keys), key=lambda key: key[0] != BASELINE):
            fits = next((row for row in report.budget if (row.role, row.cache) == (role, cache)), None)
            scored = next((row for row in report.quality if (row.role, row.cache) == (role, cache)), None)
            timed = [row for row in report.speed if (row.role, row.cache) == (role, cache) and row.problem is None]
            fastest = max(timed, key=lambda row: (row.context_tokens, -row.batch_size), default=None)
            ratio = None if fastest is None else fastest.decode_ratio_to_baseline
            if any((row.role, row.cache) == (role, cache) and row.flags for row in report.memory):
                flagged.add(len(lines))
            lines.append(
                (
                    f"{title}: {label(role, cache)}" if len(reports) > 1 else label(role, cache),
                    size(fits.cache_bytes_per_token) if fits else "-",
                    number(100 * fits.shared_bytes / own.shared_bytes, 1) if fits and own else "-",
                    longest_context(fits.longest_context_tokens, report.model_max_context_tokens) if fits else "-",
                    f"{fits.largest_batch:,}" if fits else "-",
                    number(None if scored is None else scored.perplexity, 3),
                    number(None if scored is None else scored.agreement_percent, 1),
                    "-" if ratio is None or fastest is None else f"{ratio:.2f} × at {fastest.context_tokens:,}",
                )
            )
    budgets = ", ".join(dict.fromkeys(size(report.memory_budget_bytes) for _, report in reports))
    note = f"Longest context (batch 1) and largest batch (8192 tokens a row) that fit {budgets} beside the weights."
    if any(report.dtype == "float32" for _, report in reports):
        note += " Shares count numbers in 16 bits, also those that a float32 model keeps in 32."
    header = (
        "",
        "cache/token",
        "% of baseline",
        "longest context",
        "batch at 8k",
        "perplexity",
        "agreement %",
        "decoding",
    )
    return Section("Summary", note, header, lines, frozenset(flagged))


def longest_context(fitting: int, limit: int | None) -> str:
    """Return the longest context that fits, or the model's own limit if that is shorter."""
    return f"{fitting:,}" if limit is None or fitting <= limit else f"{limit:,} (its limit)"


def memory(reports: Named) -> Section:
    """Return the table of live and predicted cache bytes."""
    header = (
        "",
        "context",
        "batch",
        "predicted",
        "live",
        "live/predicted %",
        "prefill peak",
        "step peak",
        "weights",
        "note",
    )
    rows: list[tuple[str, ...]] = []
    flagged: set[int] = set()
    for prefix, _, row in _rows(reports, "memory"):
        if row.flags:
            flagged.add(len(rows))
        rows.append(
            (
                prefix + label(row.role, row.cache),
                f"{row.context_tokens:,}",
                str(row.batch_size),
                size(row.predicted_cache_bytes),
                size(row.live_cache_bytes),
                number(row.live_percent_of_predicted, 1),
                size(row.prefill_peak_bytes),
                size(row.decode_step_peak_bytes),
                size(row.weight_bytes),
                row.problem or "; ".join(row.flags),
            )
        )
    note = (
        "Live bytes are those of all tensors that the cache object holds after a step, each whole storage counted "
        "once. Peaks are those of the whole process (on CUDA: of the allocator). Each cell ran in a process of its own."
    )
    return Section("Memory", note, header, rows, frozenset(flagged))


def budget(reports: Named) -> Section:
    """Return the table of contexts and batches that fit the memory budget."""
    header = ("", "bytes/token", "fixed", "weights", "longest context", "batch at 8k", "the model's own limit")
    rows = [
        (
            prefix + label(row.role, row.cache),
            f"{row.cache_bytes_per_token:,.0f}",
            size(row.cache_fixed_bytes),
            size(row.weight_bytes),
            f"{row.longest_context_tokens:,}",
            f"{row.largest_batch:,}",
            f"{report.model_max_context_tokens:,}" if report.model_max_context_tokens else "-",
        )
        for prefix, report, row in _rows(reports, "budget")
    ]
    budgets = ", ".join(dict.fromkeys(size(report.memory_budget_bytes) for _, report in reports))
    note = f"Computed from the measured bytes for {budgets} minus the weights. Activations are not counted."
    return Section("What it buys", note, header, rows)


def speed(reports: Named) -> Section:
    """Return the table of prefill and decoding speeds."""
    header = ("", "context", "batch", "prefill/s", "± %", "×", "decode/s", "± %", "×", "attention %", "note")
    rows = [
        (
            prefix + label(row.role, row.cache),
            f"{row.context_tokens:,}",
            str(row.batch_size),
            number(row.prefill_tokens_per_second, 0),
            number(row.prefill_spread_percent, 0),
            number(row.prefill_ratio_to_baseline),
            number(row.decode_tokens_per_second, 1),
            number(row.decode_spread_percent, 0),
            number(row.decode_ratio_to_baseline),
            number(row.attention_percent_of_decode, 0),
            row.problem or "",
        )
        for prefix, _, row in _rows(reports, "speed")
    ]
    note = (
        "Medians of tokens per second, all rows together. ± is the distance between the quartiles. × is the speed "
        "divided by that of the baseline, which was timed in turn in the same process. Loading, tokenizing and "
        "sampling are not timed. Attention is the share of a decoding step that its modules take, projections included."
    )
    return Section("Speed", note, header, rows)


def quality(reports: Named) -> Section:
    """Return the table of perplexity, agreement and divergence."""
    header = ("", "perplexity", "same next token %", "KL, nats", "tokens", "note")
    rows = [
        (
            prefix + label(row.role, row.cache),
            number(row.perplexity, 3),
            number(row.agreement_percent, 2),
            number(row.kl_nats, 4) + ("" if row.kl_stderr_nats is None else f" ± {row.kl_stderr_nats:.4f}"),
            "-" if row.scored_tokens is None else f"{row.scored_tokens:,}",
            row.problem or "",
        )
        for prefix, _, row in _rows(reports, "quality")
    ]
    texts = [report.data["eval-data"] for _, report in reports if report.data]
    windows = "; ".join(
        dict.fromkeys(
            f"windows of {text['tokens_per_window']} tokens, stride {text['stride_tokens']}" for text in texts
        )
    )
    note = f"One token at a time through the live cache, in {windows}. Only the last tokens of a window are scored."
    return Section("Quality", note, header, rows)


def tasks(reports: Named) -> Section:
    """Return the table of `lm_eval` tasks."""
    rows = [
        (prefix + row.role, row.task, row.metric, number(row.value, 4), number(row.stderr, 4), row.problem or "")
        for prefix, _, row in _rows(reports, "tasks")
    ]
    note = (
        "Measured by lm_eval. Generated answers come through the model's own cache. Given answers are scored in one "
        "pass with their question, which does not read quantized tokens."
    )
    return Section("Tasks", note, ("", "task", "metric", "value", "±", "note"), rows)


def facts(reports: Named) -> list[tuple[str, str]]:
    """Return what was measured and on which machine, as names and texts."""
    found = []
    for title, report in reports:
        prefix = f"{title}: " if len(reports) > 1 else ""
        found += [
            (f"{prefix}model", report.model),
            (f"{prefix}baseline", report.baseline or "none"),
            (f"{prefix}machine", f"{report.machine}, {report.device}, {report.threads} threads, {report.dtype}"),
            (f"{prefix}versions", ", ".join(f"{name} {what}" for name, what in report.versions.items())),
        ]
        if report.interrupted:
            found.append((f"{prefix}interrupted", "the run was stopped, and this is what had been measured before"))
    return found


def heading(reports: Named) -> str:
    """Return the title of the page."""
    names = [title for title, _ in reports]
    return names[0] if len(names) == 1 else f"{len(names)} reports compared"


def verdicts(reports: Named) -> list[str]:
    """Return the verdict and the break-even of each report that has them, with its name where there are several."""
    found = [(title, text) for title, report in reports for text in (verdict(report), break_even(report))]
    return [f"{title}: {text}" if len(reports) > 1 else text for title, text in found if text]


def terminal(reports: Named) -> str:
    """Return the summary and the verdict as plain text for a terminal."""
    section = summary(reports)
    return "\n".join([table(section.header, section.rows), section.note, *verdicts(reports)])


def markdown(reports: Named) -> str:
    """Return the content of `report.md`."""
    lines = [f"# {heading(reports)}", ""]
    for text in verdicts(reports):
        lines += [text, ""]
    for section in sections(reports):
        lines += [f"## {section.title}", "", section.note, ""]
        lines += [_line(section.header), "|".join(["", "---", *["---:"] * (len(section.header) - 1), ""])]
        lines += [
            _line([f"**{row[0]}**", *row[1:]]) if i in section.flagged else _line(row)
            for i, row in enumerate(section.rows)
        ]
        lines.append("")
    lines += ["## What was measured", "", *[f"- {name}: {text}" for name, text in facts(reports)], ""]
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def html(reports: Named) -> str:
    """Return the content of `report.html`, which holds its styles and plots and loads nothing."""
    from optimum_mla.report.plots import benchmark_plots

    environment = Environment(
        loader=PackageLoader("optimum_mla.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    template = environment.get_template("report.html.jinja")
    return template.render(
        heading=heading(reports),
        verdicts=verdicts(reports),
        sections=sections(reports),
        plots=benchmark_plots(reports),
        facts=facts(reports),
    )
