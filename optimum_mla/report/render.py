"""Reports as text: numbers in cells, tables for terminals, and what commands print about a result."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from optimum_mla.report.schema import CodecReport, ConversionReport, ExportReport, QuantizationReport, RecoveryReport

FORM_RULES = {
    "full": "each decoding step up-projects every cached key, which suits quality, short contexts and batch work",
    "rebuilt": "only the latent is cached, and each step rebuilds the rotary dims of every cached key, which gives the "
    "best quality for its size at any length",
    "cached": "the structure of DeepSeek, which decodes fastest and which engines run, at lower quality for its size",
    "per head": "each key head keeps a rotary key of its own in the cache, which no engine but Transformers runs",
}
"""Advice on each form, by `LayerReport.rope_cache` or, without a decoupled rotary key, by `attention_form`."""


@dataclass(frozen=True)
class Table:
    """A table, whose text is that for a terminal; the templates show it in Markdown and HTML.

    Attributes:
        header: Names of the columns.
        rows: Cells of the rows; see `cell`.
        title: Heading above the table on a page.
        note: A sentence on what the table shows.
        flagged: Indices of the rows that a reader must look at.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    note: str = ""
    flagged: frozenset[int] = frozenset()

    @classmethod
    def of(cls, header: Sequence[str], *rows: tuple[Any, ...]) -> Table:
        """Return a table of rows that each hold a label, the format of its values (see `cell`), and the values."""
        return cls(header, [[label, *(cell(value, form) for value in values)] for label, form, *values in rows])

    def __str__(self) -> str:
        """Return the table for a terminal, with the first column left-aligned and the others right-aligned."""
        lines = [self.header, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        sides = "<" + ">" * (len(widths) - 1)
        first, *rest = [
            "  ".join(f"{text:{side}{width}}" for text, width, side in zip(line, widths, sides, strict=True))
            for line in lines
        ]
        return "\n".join([first, "-" * len(first), *rest])


def cell(value: Any, form: str = "") -> str:
    """Return a value as it is shown in a table, or `-` for one that was not measured.

    Args:
        value: A number, a text, which stays as it is, or None.
        form: Its format, such as `.2f`, or `bytes`; see `size`.
    """
    if value is None or isinstance(value, str):
        return "-" if value is None else value
    return size(value) if form == "bytes" else f"{value:{form}}"


def size(value: float) -> str:
    """Return a number of bytes in decimal units with three digits, such as `1.54 GB`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}" if value < 1000 * scale else f"{value / scale:,.0f} {unit}"
    return f"{value:.0f} B"


@cache
def _templates() -> Environment:
    """Return the templates, of which those of HTML escape what they are given."""
    made = Environment(
        loader=PackageLoader("optimum_mla.report"),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {"cell": cell, "span": span}
    return made


def fill(template: str, **values: Any) -> str:
    """Return a page, a model card or a section of one, made of the template of that name."""
    return _templates().get_template(f"{template}.jinja").render(**values)


def summary_table(reports: Iterable[ConversionReport]) -> str:
    """Return the table that a conversion prints at its end, below the warnings about quality, if there are any."""
    reports = list(reports)
    columns = "method,numbers/token/layer,bytes/token,% of source,perplexity before,after,seconds,peak MB"
    rows = [
        (
            report.method,
            cell(report.cache_numbers_per_token_per_layer, "g"),
            cell(report.shared_bytes[1], "g"),
            cell(report.cache_percent_of_source, ".1f"),
            cell(report.perplexity_before, ".2f"),
            cell(report.perplexity_after, ".2f"),
            cell(report.conversion_seconds, ".1f"),
            cell(report.peak_memory_bytes / 1e6, ".0f"),
        )
        for report in reports
    ]
    warnings = [f"{report.method}: {report.quality_warning}" for report in reports if report.quality_warning]
    return "\n".join([*warnings, str(Table(columns.split(","), rows))])


def choices(report: ConversionReport) -> str:
    """Return a few lines on what was chosen for the layers and why."""
    first = report.layers[0]
    form = first.rope_cache or first.attention_form
    form = "per head" if form == "cached" and first.num_rope_heads > 1 else form
    before = [100 * layer.state_error for layer in report.layers if layer.state_error is not None]
    after = [100 * layer.healed_error for layer in report.layers if layer.healed_error is not None]
    values = {"form": form, "rule": FORM_RULES[form], "before": before, "after": after}
    return fill("choices.txt", report=report, **values).rstrip()


def span(values: Iterable[float], form: str) -> str:
    """Return the lowest and the highest of several values as text, or one value if they are equal."""
    found = list(values)
    return " to ".join(f"{value:{form}}" for value in dict.fromkeys((min(found), max(found))))


def sample_lines(report: ConversionReport) -> str:
    """Return what the source model and the result say to the same prompt, as lines of text."""
    said = report.sample or {}
    return "".join(f"\n{name}: {' '.join(said[name].split())}" for name in ("prompt", "source", "result") if said)


def codec_table(report: CodecReport) -> Table:
    """Return the table that a run prints at its end, and the model card holds."""
    stated = f"  % of a cache of {report.stated_tokens:,} tokens"
    return Table.of(
        ("", "source", "coded"),
        ("bytes of an old token", ",", report.source_bytes_per_token, report.coded_bytes_per_token),
        (stated, ".1f", 100.0, report.percent_at_stated_tokens),
        ("  % of long caches", ".1f", 100.0, report.percent_of_long_caches),
        ("perplexity after a prompt", ".3f", report.perplexity_before, report.perplexity_after),
        ("divergence, nats", ".4f", "0", report.divergence_nats),
        ("same first guess, %", ".1f", 100.0, report.same_guess_percent),
    )


def quantization_table(report: QuantizationReport) -> Table:
    """Return the table that `mla-quantize` prints at its end."""
    cache = f"cache of {report.context_tokens} tokens in {report.dtype}, MB"
    return Table.of(
        ("", "before", "after"),
        (cache, ".3f", report.cache_bytes_before / 1e6, report.cache_bytes_after / 1e6),
        ("  % of the source model's, in 16 bits", ".1f", report.cache_percent_before, report.cache_percent_after),
        ("weights, MB", ".2f", report.weight_bytes_before / 1e6, report.weight_bytes_after / 1e6),
        ("perplexity, token by token", ".3f", report.perplexity_before, report.perplexity_after),
    )


def divergence(perplexity: float | None) -> float | None:
    """Return the divergence that a perplexity of a training as used stands for; see `RecoveryReport.as_used`."""
    return None if perplexity is None else math.log(perplexity)


def closed_share(report: RecoveryReport) -> float | None:
    """Return the share of the excess log-perplexity over the source that a training closed; None if not measured."""
    source, converted, recovered = report.perplexity_source, report.perplexity_converted, report.perplexity_recovered
    if source is None or converted is None or recovered is None or converted <= source:
        return None
    return 1 - math.log(recovered / source) / math.log(converted / source)


def recovery_table(report: RecoveryReport) -> Table:
    """Return the table that `mla-finetune` prints at its end."""
    share = closed_share(report)
    percent = None if share is None else 100 * share
    before, after = report.perplexity_converted, report.perplexity_recovered
    if report.as_used:
        quality: list[tuple[Any, ...]] = [
            ("divergence from the teacher before, nats", ".4f", divergence(before)),
            ("  after", ".4f", divergence(after)),
            ("divergence closed, %", ".1f", percent),
        ]
    else:
        quality = [
            ("perplexity of the source model", ".3f", report.perplexity_source),
            ("  converted", ".3f", before),
            ("  recovered", ".3f", after),
            ("excess log-perplexity closed, %", ".1f", percent),
        ]
    return Table.of(
        ("", f"{report.recipe['objective']}, {report.recipe['train']}"),
        *quality,
        ("tokens seen", ",", report.tokens_seen),
        ("parameters trained", "", f"{report.trainable_parameters:,} ({report.trainable_percent:.1f} %)"),
        ("seconds", ".1f", report.seconds),
        ("peak MB", ".0f", report.peak_memory_bytes / 1e6),
    )


def export_table(report: ExportReport) -> Table:
    """Return the table that an export prints at its end."""
    rows: list[tuple[Any, ...]] = [
        ("latent, rotary dims", "", f"{report.kv_lora_rank} + {report.qk_rope_head_dim}"),
        ("query latent", "", report.q_lora_rank),
        ("cache, numbers per token", ",", report.cache_numbers_per_token),
        ("parameters more than converted", "+,", report.parameters_added),
        (f"largest logit difference, {report.dtype}", ".2g", report.largest_logit_difference),
        ("  largest logit", ".2g", report.largest_logit),
    ]
    if report.perplexity_with_norm is not None:
        rows.append(("perplexity without latent norms", ".2f", report.perplexity_without_norm))
        rows.append(("  with latent norms", ".2f", report.perplexity_with_norm))
    return Table.of(("", report.format), *rows)
