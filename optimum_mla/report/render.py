"""Reports as text: the tables that commands print, and the model cards that they write."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from optimum_mla.report.schema import ConversionReport, ExportReport, QuantizationReport, RecoveryReport

SUMMARY_HEADER = (
    "method",
    "numbers/token/layer",
    "bytes/token",
    "% of source",
    "perplexity before",
    "after",
    "seconds",
    "peak MB",
)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a plain-text table with the first column left-aligned and the others right-aligned."""
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = [
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(line, widths, strict=True)) for line in lines)
    ]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def number(value: float | None, digits: int = 2) -> str:
    """Return a number as it is shown in a table, or `-` for one that was not measured."""
    return "-" if value is None else f"{value:.{digits}f}"


def summary_row(report: ConversionReport) -> tuple[str, ...]:
    """Return the cells of one conversion, whose columns are those of `SUMMARY_HEADER`."""
    return (
        report.method,
        f"{report.cache_numbers_per_token_per_layer:g}",
        f"{report.shared_bytes[1]:g}",
        number(report.cache_percent_of_source, 1),
        number(report.perplexity_before),
        number(report.perplexity_after),
        number(report.conversion_seconds, 1),
        number(report.peak_memory_bytes / 1e6, 0),
    )


def summary_table(reports: Iterable[ConversionReport]) -> str:
    """Return the table that a conversion prints at its end, below the warnings about quality, if there are any."""
    reports = list(reports)
    warned = [report for report in reports if report.quality_warning is not None]
    lines = [f"{report.method}: {report.quality_warning}" for report in warned]
    return "\n".join([*lines, table(SUMMARY_HEADER, [summary_row(report) for report in reports])])


FORM_RULES = {
    "full": "each decoding step up-projects every cached key, which suits quality, short contexts and batch work",
    "rebuilt": "only the latent is cached, and each step rebuilds the rotary dims of every cached key, which gives the "
    "best quality for its size at any length",
    "cached": "the structure of DeepSeek, which decodes fastest and which engines run, at lower quality for its size",
    "per head": "each key head keeps a rotary key of its own in the cache, which no engine but Transformers runs",
}
"""Advice on each form, by `LayerReport.rope_cache` or, without a decoupled rotary key, by `attention_form`."""


def _span(values: Iterable[float], digits: int | None = None) -> str:
    """Return the lowest and the highest of several values as text, or one value if they are equal."""
    show = (lambda v: f"{v:g}") if digits is None else (lambda v: f"{v:.{digits}f}")
    low, high = min(values := list(values)), max(values)
    return show(low) if low == high else f"{show(low)} to {show(high)}"


def wider(report: ConversionReport) -> str | None:
    """Return a line that names the bytes of a cache in a dtype of more than 16 bits, or None for one of 16 bits."""
    source, result = report.source_cache_bytes_per_token, report.cache_bytes_per_token
    if (source, result) == report.shared_bytes:
        return None
    return (
        f"bytes are those in 16 bits; in {report.dtype} the result takes {result:g} a token and the source {source:g}."
    )


def choices(report: ConversionReport) -> str:
    """Return a few lines on what was chosen for the layers and why."""
    layers = report.layers
    form = layers[0].rope_cache or layers[0].attention_form
    if layers[0].num_rope_heads > 1 and form == "cached":
        form = "per head"
    lines = [line for line in (wider(report), f"form: {form}; {FORM_RULES[form]}.") if line is not None]
    if any(layer.rope_cache for layer in layers):
        rotary = _span(layer.qk_rope_head_dim for layer in layers)
        searched = not report.options.get("qk_rope_head_dim") and layers[0].state_error is not None
        why = ", chosen on the calibration text" if searched else ""
        lines.append(f"latent {_span(layer.kv_lora_rank for layer in layers)}, rotary dims {rotary}{why}.")
    before = [layer.state_error for layer in layers if layer.state_error is not None]
    after = [layer.healed_error for layer in layers if layer.healed_error is not None]
    if before:
        healed = f"; refitted output projections make that {_span([100 * v for v in after], 2)} %" if after else ""
        lines.append(f"error in the hidden state, layer by layer: {_span([100 * v for v in before], 2)} %{healed}.")
    else:
        lines.append("there were no calibration data; with them the same cache gives far better quality.")
    if report.break_even_tokens:
        lines.append(
            f"{report.parameters_added:+,} parameters: with more than {report.break_even_tokens:,} tokens in the cache "
            "the whole takes less memory than the source."
        )
    elif report.break_even_tokens is None:
        lines.append(f"{report.parameters_added:+,} parameters, and no smaller cache that would make up for them.")
    return "\n".join(lines)


def sample_lines(report: ConversionReport) -> str:
    """Return what the source model and the result say to the same prompt, as lines of text."""
    if report.sample is None:
        return ""
    said = {name: " ".join(text.split()) for name, text in report.sample.items()}
    return f"\nprompt: {said['prompt']}\nsource: {said['source']}\nresult: {said['result']}"


def quantization_table(report: QuantizationReport) -> str:
    """Return the table that `mla-quantize` prints at its end."""
    rows = [
        (
            f"cache of {report.context_tokens} tokens in {report.dtype}, MB",
            number(report.cache_bytes_before / 1e6, 3),
            number(report.cache_bytes_after / 1e6, 3),
        ),
        (
            "  % of the source model's, in 16 bits",
            number(report.cache_percent_before, 1),
            number(report.cache_percent_after, 1),
        ),
        ("weights, MB", number(report.weight_bytes_before / 1e6), number(report.weight_bytes_after / 1e6)),
        ("perplexity, token by token", number(report.perplexity_before, 3), number(report.perplexity_after, 3)),
    ]
    return table(("", "before", "after"), rows)


def divergence(perplexity: float | None) -> float | None:
    """Return the divergence that a perplexity of a training as used stands for; see `RecoveryReport.as_used`."""
    return None if perplexity is None else math.log(perplexity)


def closed(report: RecoveryReport) -> float | None:
    """Return the share of the excess log-perplexity over the source that a training closed; None if not measured."""
    source, converted, recovered = report.perplexity_source, report.perplexity_converted, report.perplexity_recovered
    if source is None or converted is None or recovered is None or converted <= source:
        return None
    return 1 - math.log(recovered / source) / math.log(converted / source)


def recovery_table(report: RecoveryReport) -> str:
    """Return the table that `mla-finetune` prints at its end."""
    share = closed(report)
    closed_percent = "-" if share is None else number(100 * share, 1)
    if report.as_used:
        rows = [
            ("divergence from the teacher before, nats", number(divergence(report.perplexity_converted), 4)),
            ("  after", number(divergence(report.perplexity_recovered), 4)),
            ("divergence closed, %", closed_percent),
        ]
    else:
        rows = [
            ("perplexity of the source model", number(report.perplexity_source, 3)),
            ("  converted", number(report.perplexity_converted, 3)),
            ("  recovered", number(report.perplexity_recovered, 3)),
            ("excess log-perplexity closed, %", closed_percent),
        ]
    rows += [
        ("tokens seen", f"{report.tokens_seen:,}"),
        ("parameters trained", f"{report.trainable_parameters:,} ({report.trainable_percent:.1f} %)"),
        ("seconds", number(report.seconds, 1)),
        ("peak MB", number(report.peak_memory_bytes / 1e6, 0)),
    ]
    return table(("", f"{report.recipe['objective']}, {report.recipe['train']}"), rows)


def export_table(report: ExportReport) -> str:
    """Return the table that an export prints at its end."""
    rows = [
        ("latent, rotary dims", f"{report.kv_lora_rank} + {report.qk_rope_head_dim}"),
        ("query latent", "-" if report.q_lora_rank is None else str(report.q_lora_rank)),
        ("cache, numbers per token", f"{report.cache_numbers_per_token:,}"),
        ("parameters more than converted", f"{report.parameters_added:+,}"),
        (f"largest logit difference, {report.dtype}", f"{report.largest_logit_difference:.2g}"),
        ("  largest logit", f"{report.largest_logit:.2g}"),
    ]
    if report.perplexity_with_norm is not None:
        rows.append(("perplexity without latent norms", number(report.perplexity_without_norm)))
        rows.append(("  with latent norms", number(report.perplexity_with_norm)))
    return table(("", report.format), rows)
