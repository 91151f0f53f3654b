"""The findings of `mla-inspect`, and their form as text."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from optimum_mla.report.break_even import tokens_text
from optimum_mla.report.pages import size
from optimum_mla.report.render import number, table

WIDE = {"float32": 2, "float64": 4}
"""Dtypes of more than 16 bits, and how many times as large their numbers are."""


@dataclass(frozen=True)
class Choice:
    """The result of one method at one size of the cache.

    Attributes:
        method: The method with its options, as on the command line.
        kv_cache_ratio: The requested size as a share of the source's cache.
        cache_numbers_per_token: Largest count of numbers that all layers together cache per token.
        cache_bytes_per_token: Bytes of the cache per token, with numbers in 16 bits.
        cache_percent_of_source: Resulting size in percent of the source's 16-bit cache.
        parameters_added: Smallest number of parameters that the conversion adds; negative if it removes some.
        parameters_added_most: Largest such number; calibration chooses how many dims keep their rotation.
        break_even_tokens: Tokens in the cache from which the result takes less memory than the source, its added
            parameters included, and reads less of it in a decoding step; None if it never does.
        problem: Why this conversion is impossible, or None.
    """

    method: str
    kv_cache_ratio: float
    cache_numbers_per_token: int | None = None
    cache_bytes_per_token: float | None = None
    cache_percent_of_source: float | None = None
    parameters_added: int | None = None
    parameters_added_most: int | None = None
    break_even_tokens: int | None = None
    problem: str | None = None


@dataclass(frozen=True)
class EngineChoice:
    """The answer to whether an engine can run the result.

    Attributes:
        engine: Its name.
        options: Options of `mla-convert` that make a shape which the engine can run; `as it is` for a converted model.
        cache_percent_of_source: Size of the cache of that shape, or None if the engine runs every shape.
        blockers: Reasons why the engine cannot run the result; empty if it can.
    """

    engine: str
    options: str
    cache_percent_of_source: float | None
    blockers: list[str]


@dataclass(frozen=True)
class Inspection:
    """The facts about a model that are known before its weights are loaded.

    Attributes:
        model: Name of the model as the user gave it.
        model_type: The `model_type` in its config.
        state: `convertible`, `converted`, or `not convertible`.
        reason: Why the model is not convertible, or None.
        parameters: Number of parameters in the checkpoint.
        weight_bytes: Bytes of the weights in the checkpoint.
        dtype: Dtype of most of the weights.
        layers: Number of layers.
        hidden_size: Hidden size.
        num_attention_heads: Number of query heads.
        num_key_value_heads: Number of key/value heads.
        head_dim: Dims of a head.
        features: Properties that matter for a conversion: biases, norms, windows, rotary scaling.
        source_cache_bytes_per_token: Bytes that the unconverted model caches per token, with numbers in 16 bits.
        cache_bytes_per_token: Bytes that the model caches per token as it is, with numbers in 16 bits.
        conversion_memory_bytes: Estimated peak memory of a conversion with default options, or None.
        choices: Results of each method at each size.
        engines: Engines that could run the result.
    """

    model: str
    model_type: str
    state: str
    reason: str | None
    parameters: int
    weight_bytes: int
    dtype: str
    layers: int | None = None
    hidden_size: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    features: list[str] = field(default_factory=list)
    source_cache_bytes_per_token: float | None = None
    cache_bytes_per_token: float | None = None
    conversion_memory_bytes: int | None = None
    choices: list[Choice] = field(default_factory=list)
    engines: list[EngineChoice] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return asdict(self)


def inspection_text(found: Inspection) -> str:
    """Return the text that `mla-inspect` prints."""
    lines = [
        f"{found.model}: {found.model_type}, {found.parameters:,} parameters, {size(found.weight_bytes)}, "
        f"{found.dtype}",
        f"{found.state}" + (f": {found.reason}" if found.reason else ""),
    ]
    if found.layers is None:
        return "\n".join(lines)
    lines.append(
        f"{found.layers} layers, hidden size {found.hidden_size}, {found.num_attention_heads} query and "
        f"{found.num_key_value_heads} key/value heads of {found.head_dim} dims"
        + (f"; {', '.join(found.features)}" if found.features else "")
    )
    lines.append(f"the source caches {found.source_cache_bytes_per_token:,.0f} bytes per token in 16 bits")
    if found.state == "converted":
        lines[-1] += f", this model {found.cache_bytes_per_token:,.0f}"
    if found.dtype in WIDE:
        lines[-1] += f"; numbers that are kept in {found.dtype} take {WIDE[found.dtype]} times as much"
    if found.choices:
        rows = [
            (
                f"{row.method}, {row.kv_cache_ratio:g}",
                "-" if row.cache_numbers_per_token is None else f"{row.cache_numbers_per_token:,}",
                f"{row.cache_bytes_per_token:,.0f}",
                number(row.cache_percent_of_source, 1),
                f"{row.parameters_added:+,}"
                + (f" to {row.parameters_added_most:+,}" if row.parameters_added_most != row.parameters_added else ""),
                tokens_text(row.break_even_tokens),
            )
            for row in found.choices
            if row.problem is None
        ]
        lines += [
            "",
            table(
                ("method, ratio", "numbers/token", "bytes/token", "% of source", "parameters", "pays from, tokens"),
                rows,
            ),
        ]
        lines.append(
            "pays from: so many tokens in the cache, all rows together, save more memory than the added parameters take"
        )
        lines += [f"{row.method}, {row.kv_cache_ratio:g}: {row.problem}" for row in found.choices if row.problem]
    lines.append("")
    for engine in found.engines:
        share = engine.cache_percent_of_source
        can = engine.options if share is None else f"{engine.options}: {share:.1f} % of the source's cache"
        lines.append(f"{engine.engine}: " + (f"no, {'; '.join(engine.blockers)}" if engine.blockers else can))
    if found.conversion_memory_bytes is not None:
        memory = size(found.conversion_memory_bytes)
        lines += ["", f"a conversion of the weights with default options needs about {memory} of memory"]
    return "\n".join(lines)
