"""Whether a conversion is worth it: a model's cache beside the quantized caches that its source has anyway."""

from __future__ import annotations

from dataclasses import dataclass

from optimum_mla.report.break_even import break_even_tokens
from optimum_mla.report.rows import BASELINE, MODEL, BenchmarkReport

SAME = 1.002
"""Perplexities within this factor of each other count as equal."""


@dataclass(frozen=True)
class Place:
    """The size and the quality of one model with one cache.

    Attributes:
        role: `model` or `baseline`.
        cache: Name of the cache.
        percent: Bytes per token in percent of those of the baseline with its unquantized cache.
        perplexity: Perplexity on the evaluation text.
    """

    role: str
    cache: str
    percent: float
    perplexity: float

    @property
    def name(self) -> str:
        """Return the name of the model with its cache, as in a sentence."""
        who = "the source" if self.role == BASELINE else "the model"
        return who if self.cache == "default" else f"{who} with the cache {self.cache}"


def places(report: BenchmarkReport) -> list[Place]:
    """Return the bytes and the perplexity of every model and cache for which both were measured."""
    sizes = {(row.role, row.cache): row.cache_bytes_per_token for row in report.budget}
    whole = sizes.get((BASELINE, "default"))
    if not whole:
        return []
    return [
        Place(row.role, row.cache, 100 * sizes[row.role, row.cache] / whole, row.perplexity)
        for row in report.quality
        if row.perplexity is not None and sizes.get((row.role, row.cache), 0) > 0
    ]


def verdict(report: BenchmarkReport) -> str:
    """Return one or two sentences that compare the model with its source at their sizes, or an empty text.

    The model's best place is the smallest cache among those that no quantized cache of the source beats in both size
    and perplexity; without one it is the smallest cache.
    """
    found = places(report)
    whole = next((one for one in found if (one.role, one.cache) == (BASELINE, "default")), None)
    own = [one for one in found if one.role == MODEL]
    theirs = [one for one in found if one.role == BASELINE and one is not whole]
    if whole is None or not own:
        return ""
    standing = [one for one in own if not any(_beats(other, one) for other in theirs)]
    best = min(standing or own, key=lambda one: one.percent)
    text = f"{_capital(best.name)} keeps {_cost(best, whole)}"
    if not theirs:
        return f"{text}."
    near = min(theirs, key=lambda one: (abs(one.percent - best.percent), one.perplexity))
    text += f"; {near.name} keeps {_cost(near, whole)}."
    if not standing:
        return f"{text} Here the source's own quantized cache is smaller and no worse: converting is not worth it."
    if any(_beats(best, other) for other in theirs):
        return f"{text} Here the conversion is smaller and no worse: it is worth it."
    return f"{text} Neither is better in both size and quality."


def break_even(report: BenchmarkReport) -> str:
    """Return from which context on the model takes less memory and decodes as fast as its source, or an empty text.

    Memory counts the weights too, which a conversion makes larger. Speed is that of the smallest measured batch.
    """
    rows = {(row.role, row.cache): row for row in report.budget}
    model, whole = rows.get((MODEL, "default")), rows.get((BASELINE, "default"))
    said = []
    if model is not None and whole is not None:
        added = model.weight_bytes - whole.weight_bytes
        tokens = break_even_tokens(added, whole.cache_bytes_per_token - model.cache_bytes_per_token)
        if tokens is None:
            said.append("With its larger weights it never takes less memory than the source.")
        elif tokens > 0:
            said.append(f"It takes less memory than the source from {tokens:,} tokens in the cache on.")
    timed = sorted(
        (row.batch_size, row.context_tokens, row.decode_ratio_to_baseline)
        for row in report.speed
        if (row.role, row.cache) == (MODEL, "default") and row.decode_ratio_to_baseline is not None
    )
    timed = [row for row in timed if row[0] == timed[0][0]]
    if timed:
        spans = ", ".join(f"{ratio:.2f} × at {context:,}" for _, context, ratio in timed)
        fast = next((context for _, context, ratio in timed if ratio >= 1), None)
        since = "at none of the measured contexts" if fast is None else f"from {fast:,} tokens on"
        said.append(f"It decodes as fast as the source {since} ({spans}).")
    return " ".join(said)


def _beats(one: Place, other: Place) -> bool:
    """Return whether one place is at most as large as the other and at most as far from the source."""
    return one.percent <= other.percent and one.perplexity <= other.perplexity * SAME


def _cost(place: Place, whole: Place) -> str:
    rise = 100 * (place.perplexity / whole.perplexity - 1)
    return f"{place.percent:.1f} % of the source's bytes per token for {rise:+.1f} % perplexity"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
