"""What `mla-inspect` finds, and how it is shown."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from optimum_mla.report.pages import size
from optimum_mla.report.render import number, table


@dataclass(frozen=True)
class Choice:
    """One method at one size.

    Attributes:
        method: With its options, as typed.
        kv_cache_ratio: Asked for.
        cache_numbers_per_token: All layers, at most. cache_bytes_per_token: In the checkpoint's dtype.
        cache_percent_of_source: What results.
        parameters_added: More than the source has (negative: fewer), at least. parameters_added_most: Likewise, at
            most: calibration chooses how many of the dims keep their rotation.
        problem: Why it cannot be, or None.
    """

    method: str
    kv_cache_ratio: float
    cache_numbers_per_token: int | None = None
    cache_bytes_per_token: float | None = None
    cache_percent_of_source: float | None = None
    parameters_added: int | None = None
    parameters_added_most: int | None = None
    problem: str | None = None


@dataclass(frozen=True)
class EngineChoice:
    """Whether an engine can run the result.

    Attributes:
        engine: Its name.
        options: Of `mla-convert`, so that it can; or `as it is` for a converted model.
        cache_percent_of_source: At that shape, or None where any shape will do.
        blockers: Why it cannot; empty where it can.
    """

    engine: str
    options: str
    cache_percent_of_source: float | None
    blockers: list[str]


@dataclass(frozen=True)
class Inspection:
    """What is known of a model before its weights are loaded.

    Attributes:
        model: As the user named it. model_type: Of its config.
        state: `convertible`, `converted`, or `not convertible`. reason: Of the last.
        parameters: In the checkpoint. weight_bytes: Likewise. dtype: Of most of them.
        layers, hidden_size, num_attention_heads, num_key_value_heads, head_dim: Of the attention.
        features: What bears on a conversion: biases, norms, windows, rotary scaling.
        source_cache_bytes_per_token: Of the unconverted model, in its dtype.
        cache_bytes_per_token: Of the model as it is.
        conversion_memory_bytes: Estimate of a conversion's peak with default options, or None.
        choices: What each method gives. engines: Who can run it.
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
        """For JSON."""
        return asdict(self)


def inspection_text(found: Inspection) -> str:
    """What `mla-inspect` prints."""
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
    lines.append(f"the source caches {found.source_cache_bytes_per_token:,.0f} bytes per token")
    if found.state == "converted":
        lines[-1] += f", this model {found.cache_bytes_per_token:,.0f}"
    if found.choices:
        rows = [
            (
                f"{row.method}, {row.kv_cache_ratio:g}",
                f"{row.cache_numbers_per_token:,}",
                f"{row.cache_bytes_per_token:,.0f}",
                number(row.cache_percent_of_source, 1),
                f"{row.parameters_added:+,}"
                + (f" to {row.parameters_added_most:+,}" if row.parameters_added_most != row.parameters_added else ""),
            )
            for row in found.choices
            if row.problem is None
        ]
        lines += ["", table(("method, ratio", "numbers/token", "bytes/token", "% of source", "parameters"), rows)]
        lines += [f"{row.method}, {row.kv_cache_ratio:g}: {row.problem}" for row in found.choices if row.problem]
    lines.append("")
    for engine in found.engines:
        share = engine.cache_percent_of_source
        can = engine.options if share is None else f"{engine.options}: {share:.1f} % of the source's cache"
        lines.append(f"{engine.engine}: " + (f"no, {'; '.join(engine.blockers)}" if engine.blockers else can))
    if found.conversion_memory_bytes is not None:
        lines += ["", f"a conversion with default options needs about {size(found.conversion_memory_bytes)} of memory"]
    return "\n".join(lines)
