"""The verdicts of a conversion and of a training in words, and the command to run next."""

from __future__ import annotations

import shlex

from optimum_mla.report.quality_limit import LARGEST_RISE
from optimum_mla.report.schema import ConversionReport, RecoveryReport

NOTHING_LOST = 0.01
"""Largest relative rise of the perplexity that is called nothing."""
BROKEN = 1.0
"""Relative rise of the perplexity from which a model is called broken."""


def verdict(report: ConversionReport) -> str:
    """Return one sentence that says what the conversion saved and what it cost."""
    saved = f"The cache is {report.cache_percent_of_source:.3g} % of the source's"
    before, after = report.perplexity_before, report.perplexity_after
    if before is None or after is None:
        return f"{saved}. What that costs in quality was not measured, as there was no text."
    rise = after / before - 1
    text = f"the {report.perplexity_text} text"
    if rise <= NOTHING_LOST:
        return f"{saved}, and on {text} the model is as good as before ({100 * rise:+.1f} % perplexity)."
    if rise <= LARGEST_RISE:
        return f"{saved}, for {100 * rise:.1f} % more perplexity on {text}: a small loss, which training can win back."
    if rise < BROKEN:
        return f"{saved}, for {100 * rise:.0f} % more perplexity on {text}: train it before you use it."
    return f"{saved}, but the model is broken: its perplexity on {text} rose from {before:.4g} to {after:.4g}."


def next_command(report: ConversionReport, output: str) -> str:
    """Return the command that a user would run next on the result.

    Args:
        report: The report of the conversion.
        output: The folder of the result.
    """
    folder = shlex.quote(output.rstrip("/"))
    before, after = report.perplexity_before, report.perplexity_after
    if before is None or after is None:
        return f"optimum-cli mla-benchmark -m {folder} --eval-data TEXT {folder}-report"
    if after / before - 1 > NOTHING_LOST:
        return f"optimum-cli mla-finetune -m {folder} --train-data TEXT --merge {folder}-recovered"
    if report.options.get("kv_cache_budget") is not None:  # the latents are codes of few bits already
        return f"optimum-cli mla-benchmark -m {folder} -b {shlex.quote(report.model)} --eval-data TEXT {folder}-report"
    return f"optimum-cli mla-quantize -m {folder} --cache-bits 4 {folder}-int4"


def recovery_verdict(report: RecoveryReport) -> str:
    """Return one sentence that says what a training brought, or how to find out."""
    before, after = report.perplexity_converted, report.perplexity_recovered
    if before is None or after is None:
        return "What the training brought was not measured. Give held-out text with --eval-data."
    if after > before:
        return (
            f"warning: the training made the model worse: its perplexity on the evaluation text rose from {before:.2f} "
            f"to {after:.2f}. Take a lower --learning-rate, more text, or text more like the evaluation's."
        )
    return f"The training brought the perplexity on the evaluation text from {before:.2f} to {after:.2f}."
