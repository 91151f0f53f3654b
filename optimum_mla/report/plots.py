"""Plots of reports, as PNG files."""

from __future__ import annotations

from pathlib import Path

from optimum_mla.report.schema import RecoveryReport


def loss_curve(report: RecoveryReport, path: Path) -> None:
    """Loss against optimizer steps, one line a stage."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for stage in dict.fromkeys(entry["stage"] for entry in report.losses):
        entries = [entry for entry in report.losses if entry["stage"] == stage]
        axes.plot([e["step"] for e in entries], [e["loss"] for e in entries], marker=".", label=stage)
    axes.set(xlabel="optimizer step", ylabel="loss, nats")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
