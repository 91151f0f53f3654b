"""Plots of reports as PNG files, and as SVG that takes the text colour of a page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
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


def loss_curve(report: RecoveryReport, path: Path) -> None:
    """Draw the loss against optimizer steps, with one line per stage, and save it as a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for stage in dict.fromkeys(entry["stage"] for entry in report.losses):
        entries = [entry for entry in report.losses if entry["stage"] == stage]
        axes.plot([e["step"] for e in entries], [e["loss"] for e in entries], marker=".", label=stage)
    axes.set(xlabel="optimizer step", ylabel="loss, nats")
    axes.grid(alpha=0.3)
    if len({entry["stage"] for entry in report.losses}) > 1:
        figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)


@dataclass(frozen=True)
class Plot:
    """A drawing for a page.

    Attributes:
        title: Title of the plot.
        svg: An `<svg>` element, whose text and axes have the `color` of the page.
    """

    title: str
    svg: str


def benchmark_plots(reports: Sequence[tuple[str, BenchmarkReport]]) -> list[Plot]:
    """Return plots of quality against cache bytes, and of cache bytes and decoding speed against the context.

    Plots that would show a single point are left out.
    """
    several = len(reports) > 1
    caches: dict[str, list[tuple[float, float]]] = {}
    speeds: dict[str, list[tuple[float, float]]] = {}
    qualities: dict[str, list[tuple[float, float]]] = {}
    for title, report in reports:

        def name(role: str, cache: str, title: str = title) -> str:
            own = role if cache == "default" else f"{role}, {cache}"
            return f"{title}: {own}" if several else own

        for row in report.memory:
            if row.live_cache_bytes is not None and row.batch_size == min(report.options["batch_sizes"]):
                caches.setdefault(name(row.role, row.cache), []).append((row.context_tokens, row.live_cache_bytes))
        for timed in report.speed:
            if timed.decode_tokens_per_second is not None and timed.batch_size == min(report.options["batch_sizes"]):
                place = (timed.context_tokens, timed.decode_tokens_per_second)
                speeds.setdefault(name(timed.role, timed.cache), []).append(place)
        sizes = {(row.role, row.cache): row.cache_bytes_per_token for row in report.budget}
        for scored in report.quality:
            if scored.perplexity is not None and (scored.role, scored.cache) in sizes:
                point = (sizes[scored.role, scored.cache], scored.perplexity)
                qualities.setdefault(name(scored.role, scored.cache), []).append(point)
    drawn = (
        _svg("Quality against cache", qualities, "cache, bytes per token", "perplexity", False),
        _svg("Cache against context", caches, CONTEXT, "cache, bytes", True),
        _svg("Decoding against context", speeds, CONTEXT, "decoding, tokens per second", True),
    )
    return [plot for plot in drawn if plot is not None]


def _svg(
    title: str, lines: dict[str, list[tuple[float, float]]], across: str, up: str, logarithmic: bool
) -> Plot | None:
    """Return a plot of lines with markers, or None if all points lie at one place of the horizontal axis.

    The horizontal axis is logarithmic, and so is the vertical one if `logarithmic` is set.
    """
    if len({x for points in lines.values() for x, _ in points}) < 2:
        return None
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
            ticks = sorted({x for points in lines.values() for x, _ in points})
            axes.set_xticks(ticks, [f"{x:,}" for x in ticks])
            axes.minorticks_off()
        if logarithmic:
            axes.set_yscale("log")
        axes.set(xlabel=across, ylabel=up)
        axes.grid(color=BASELINE_COLOUR, alpha=0.25)
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
        drawing = io.StringIO()
        figure.savefig(drawing, format="svg", transparent=True, metadata={"Date": None})
    svg = drawing.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    return Plot(title, svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1))
