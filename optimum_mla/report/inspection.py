"""The findings of `mla-inspect`, and their form as text."""

from __future__ import annotations

from dataclasses import dataclass, field

from optimum_mla.report.render import Table, cell, fill, span

WIDE = {"float32": 2, "float64": 4}
"""Dtypes of more than 16 bits, and how many times as large their numbers are."""


@dataclass(frozen=True)
class Choice:
    """The result of one method at one size of the cache, with numbers in 16 bits."""

    method: str  # with its options, as on the command line
    kv_cache_ratio: float  # the requested size as a share of the source's cache
    cache_numbers_per_token: int | None = None  # largest count in all layers together
    cache_bytes_per_token: float | None = None
    cache_percent_of_source: float | None = None
    parameters_added: int | None = None  # least, as calibration chooses how many dims keep their rotation
    parameters_added_most: int | None = None
    break_even_tokens: int | None = None  # see `optimum_mla.report.break_even`; None if it is never reached
    problem: str | None = None  # why this conversion is impossible


@dataclass(frozen=True)
class EngineChoice:
    """The answer to whether an engine can run the result."""

    engine: str
    options: str  # of `mla-convert` for a shape that the engine can run; `as it is` for a converted model
    cache_percent_of_source: float | None  # of that shape; None if the engine runs every shape
    blockers: list[str]  # why the engine cannot run the result; empty if it can


@dataclass(frozen=True)
class Inspection:
    """The facts about a model that are known before its weights are loaded."""

    model: str  # as the user named it
    model_type: str
    state: str  # `convertible`, `converted` or `not convertible`
    reason: str | None  # why the model is not convertible
    parameters: int  # in the checkpoint
    weight_bytes: int  # in the checkpoint
    dtype: str  # of most of the weights
    layers: int | None = None
    hidden_size: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    features: list[str] = field(default_factory=list)  # biases, norms, windows and others that matter to a conversion
    source_cache_bytes_per_token: float | None = None  # of the unconverted model, with numbers in 16 bits
    cache_bytes_per_token: float | None = None  # of the model as it is, with numbers in 16 bits
    conversion_memory_bytes: int | None = None  # estimated peak with default options
    choices: list[Choice] = field(default_factory=list)
    engines: list[EngineChoice] = field(default_factory=list)


def inspection_text(found: Inspection) -> str:
    """Return the text that `mla-inspect` prints."""
    rows = [
        (
            f"{row.method}, {row.kv_cache_ratio:g}",
            cell(row.cache_numbers_per_token, ","),
            cell(row.cache_bytes_per_token, ",.0f"),
            cell(row.cache_percent_of_source, ".1f"),
            span((row.parameters_added or 0, row.parameters_added_most or 0), "+,"),
            "never" if row.break_even_tokens is None else f"{row.break_even_tokens:,}",
        )
        for row in found.choices
        if row.problem is None
    ]
    columns = ("method, ratio", "numbers/token", "bytes/token", "% of source", "parameters", "pays from, tokens")
    return fill("inspection.txt", found=found, table=Table(columns, rows), wide=WIDE.get(found.dtype)).strip()
