"""Plots of reports as PNG files, and as SVG that takes the text colour of a page."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optimum_mla.report.rows import BenchmarkReport
from optimum_mla.report.schema import RecoveryReport

INK = "#010203"
"""Placeholder for the text colour of the page until the SVG is written."""
COLOURS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#64748b", "#eab308", "#06b6d4")
"""Colours that are legible on white and on black."""
BASELINE_COLOUR = "#8b95a3"
CONTEXT = "context, tokens"
Lines = dict[str, list[tuple[float, float]]]
"""The points of each line of a plot, by its name."""


def loss_curve(report: RecoveryReport, path: Path) -> None:
    """Draw the loss against optimizer steps, with one line per stage, and save it as a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    stages = dict.fromkeys(entry["stage"] for entry in report.losses)
    for stage in stages:
        entries = [entry for entry in report.losses if entry["stage"] == stage]
        axes.plot([e["step"] for e in entries], [e["loss"] for e in entries], marker=".", label=stage)
    axes.set(xlabel="optimizer step", ylabel="loss, nats")
    axes.grid(alpha=0.3)
    if len(stages) > 1:
        figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)


def benchmark_plots(reports: Sequence[tuple[str, BenchmarkReport]]) -> dict[str, str]:
    """Return plots of quality against cache bytes, and of cache bytes and decoding speed against the context.

    Plots that would show a single point are left out.

    Args:
        reports: The reports, each with what goes in front of the names of its lines.

    Returns:
        `<svg>` elements, whose text and axes have the `color` of the page, by their titles.
    """
    drawn: dict[str, tuple[Lines, str, str]] = {
        "Quality against cache": (defaultdict(list), "cache, bytes per token", "perplexity"),
        "Cache against context": (defaultdict(list), CONTEXT, "cache, bytes"),
        "Decoding against context": (defaultdict(list), CONTEXT, "decoding, tokens per second"),
    }
    qualities, caches, speeds = (lines for lines, *_ in drawn.values())
    for title, report in reports:
        batch = min(report.options["batch_sizes"])
        sizes = {row.key: row.cache_bytes_per_token for row in report.budget}
        for scored in report.quality:
            if scored.perplexity is not None and scored.key in sizes:
                qualities[title + scored.name].append((sizes[scored.key], scored.perplexity))
        for row in report.memory:
            if row.live_cache_bytes is not None and row.batch_size == batch:
                caches[title + row.name].append((row.context_tokens, row.live_cache_bytes))
        for timed in report.speed:
            if timed.decode_tokens_per_second is not None and timed.batch_size == batch:
                speeds[title + timed.name].append((timed.context_tokens, timed.decode_tokens_per_second))
    return {title: _svg(title, *what) for title, what in drawn.items() if len(_across(what[0])) > 1}


def _across(lines: Lines) -> list[float]:
    """Return the places on the horizontal axis at which some line has a point."""
    return sorted({x for points in lines.values() for x, _ in points})


def _svg(title: str, lines: Lines, across: str, up: str) -> str:
    """Return a plot of lines with markers; plots against the context have two logarithmic axes, and others one."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": title,  # ids are the same in every run and differ between the plots of a page
        "font.family": "sans-serif",
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    }
    with rc_context(style):
        figure = Figure(figsize=(5.2, 3.9), layout="constrained")
        axes = figure.add_subplot(facecolor="none")
        colours = iter(COLOURS * (len(lines) // len(COLOURS) + 1))
        for name, points in lines.items():
            plain = name == "baseline" or name.endswith(": baseline")
            colour = BASELINE_COLOUR if plain else next(colours)
            xs, ys = zip(*sorted(points), strict=True)
            axes.plot(xs, ys, label=name, color=colour, marker="o", linestyle="--" if plain else "-")
        axes.set_xscale("log", base=2 if across == CONTEXT else 10)
        if across == CONTEXT:
            axes.set_xticks(_across(lines), [f"{x:,}" for x in _across(lines)])
            axes.minorticks_off()
            axes.set_yscale("log")
        axes.set(xlabel=across, ylabel=up)
        axes.grid(color=BASELINE_COLOUR, alpha=0.25)
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
        drawing = io.StringIO()
        figure.savefig(drawing, format="svg", transparent=True, metadata={"Date": None})
    svg = drawing.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    return svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
