"""Whether a conversion is worth it: a model's cache beside the quantized caches that its source has anyway."""

from __future__ import annotations

import math
from dataclasses import dataclass

from optimum_mla.report.break_even import break_even_tokens
from optimum_mla.report.rows import BASELINE, MODEL, BenchmarkReport

CERTAIN = 2.0
"""Number of standard errors beyond which two divergences count as different."""
SAME_SIZE = 0.02
"""Relative difference up to which two caches count as equally large."""
SAME_SPEED = 0.05
"""Least relative difference beyond which two speeds count as different; it is more where the times spread wider."""
WORDS = (
    {1: "smaller", 0: "as large", -1: "larger"},
    {1: "closer to the source", 0: "as close to it within the error", -1: "further from it"},
    {1: "faster", 0: "as fast within the spread", -1: "slower"},
)
"""How the differences of `Place.compare_with` are said."""


@dataclass(frozen=True)
class Place:
    """The size, the quality and the speed of one model with one cache; what was not measured is None."""

    role: str
    cache: str
    percent: float  # bytes per token in percent of those of the baseline with its unquantized 16-bit cache
    perplexity: float  # on the evaluation text
    divergence: float | None = None  # mean of that of its predictions from the baseline's, in nats
    stderr: float | None = None  # of the divergence; None for a single window
    speed: float | None = None  # of decoding, as a ratio to the baseline's, at the smallest batch and longest context
    spread: float = 0.0  # relative distance between the quartiles of the times behind the speed

    @property
    def name(self) -> str:
        """Return the name of the model with its cache, as at the beginning of a sentence."""
        who = "The source" if self.role == BASELINE else "The model"
        return who if self.cache == "default" else f"{who} with the cache {self.cache}"

    def compare_with(self, other: Place) -> tuple[int, int | None, int | None]:
        """Return the differences to another place in size, quality and speed.

        Each is 1 where this place is better, -1 where it is worse, and 0 where no difference is certain. Quality, which
        is the divergence beyond the standard errors, and speed, beyond the spread of the times, are None if not known.
        """
        quality = speed = None
        if None not in (self.divergence, other.divergence, self.stderr, other.stderr):
            unsure = CERTAIN * math.hypot(self.stderr or 0.0, other.stderr or 0.0)
            quality = _sign((other.divergence or 0.0) - (self.divergence or 0.0), unsure)
        if self.speed is not None and other.speed is not None:
            speed = _sign(self.speed - other.speed, max(SAME_SPEED, self.spread, other.spread) * other.speed)
        return _sign(other.percent - self.percent, SAME_SIZE * other.percent), quality, speed

    def is_preferable_to(self, other: Place) -> bool:
        """Return whether the difference in quality is known, something is better, and nothing is worse."""
        found = self.compare_with(other)
        known = [value for value in found if value is not None]
        return found[1] is not None and max(known) > 0 and min(known) >= 0

    def cost(self, whole: Place) -> str:
        """Return in words what this place keeps of the source with its unquantized cache."""
        rise = 100 * (self.perplexity / whole.perplexity - 1)
        said = [f"{self.percent:.1f} % of the source's bytes per token for {rise:+.1f} % perplexity"]
        if self.divergence is not None:
            error = "" if self.stderr is None else f" ± {self.stderr:.2g}"
            said.append(f"a divergence of {self.divergence:.2g}{error} nats")
        if self.speed is not None:
            said.append(f"{self.speed:.2f} × the source's decoding speed")
        return ", ".join(said[:-1]) + f" and {said[-1]}" if len(said) > 1 else said[0]


def _sign(difference: float, unsure: float) -> int:
    return 0 if abs(difference) <= unsure else 1 if difference > 0 else -1


def places(report: BenchmarkReport) -> list[Place]:
    """Return the bytes, the quality and the speed of every model and cache of which bytes and quality were measured."""
    sizes = {row.key: row.shared_bytes for row in report.budget}
    whole, found = sizes.get((BASELINE, "default")), []
    for row in report.quality:
        if not whole or row.perplexity is None or sizes.get(row.key, 0) <= 0:
            continue
        timed = [one for one in report.speed if one.key == row.key and one.decode_ratio_to_baseline]
        last = max(timed, key=lambda one: (-one.batch_size, one.context_tokens), default=None)
        percent = 100 * sizes[row.key] / whole
        ratio = None if last is None else last.decode_ratio_to_baseline
        spread = 0.0 if last is None else (last.decode_spread_percent or 0.0) / 100
        found.append(Place(*row.key, percent, row.perplexity, row.kl_nats, row.kl_stderr_nats, ratio, spread))
    return found


def benchmark_verdict(report: BenchmarkReport) -> str:
    """Return a few sentences that compare the model with one cache of its source, or an empty text.

    The model's best place is the smallest cache of those to which no quantized cache of the source is preferable in all
    of size, quality and speed; without one it is the smallest cache. It is compared with a cache of the source that is
    preferable to it, or else with that of the nearest size, by the numbers that the sentences name.
    """
    found = places(report)
    whole = next((one for one in found if (one.role, one.cache) == (BASELINE, "default")), None)
    own = [one for one in found if one.role == MODEL]
    theirs = [one for one in found if one.role == BASELINE and one is not whole]
    if whole is None or not own:
        return ""
    standing = [one for one in own if not any(other.is_preferable_to(one) for other in theirs)]
    best = min(standing or own, key=lambda one: one.percent)
    text = f"{best.name} keeps {best.cost(whole)}."
    if not theirs:
        return text
    preferable = [one for one in theirs if one.is_preferable_to(best)]
    near = min(preferable or theirs, key=lambda one: (abs(one.percent - best.percent), one.perplexity))
    differences = best.compare_with(near)
    said = [(value, words[value]) for value, words in zip(differences, WORDS, strict=True) if value is not None]
    good, bad = [word for value, word in said if value >= 0], [word for value, word in said if value < 0]
    apart = " but ".join(", ".join(words) for words in (good, bad) if words)
    text += f" {near.name} keeps {near.cost(whole)}. Beside it, the model is {apart}"
    if differences[1] is None:
        return f"{text}. Quality is not compared: it needs more than one window and the same tokens."
    if preferable:
        return f"{text}: converting is not worth it."
    if best.is_preferable_to(near):
        return f"{text}: converting is worth it."
    return f"{text}: neither is better in everything that was measured."


def break_even(report: BenchmarkReport) -> str:
    """Return from which context on the model takes less memory and decodes as fast as its source, or an empty text.

    Memory counts the weights too, which a conversion makes larger. Speed is that of the smallest measured batch.
    """
    rows, said = {row.key: row for row in report.budget}, []
    model, whole = rows.get((MODEL, "default")), rows.get((BASELINE, "default"))
    if model is not None and whole is not None:
        saved = whole.cache_bytes_per_token - model.cache_bytes_per_token
        tokens = break_even_tokens(model.weight_bytes - whole.weight_bytes, saved)
        if tokens is None:
            said.append("With its larger weights it never takes less memory than the source.")
        elif tokens > 0:
            said.append(f"It takes less memory than the source from {tokens:,} tokens in the cache on.")
    timed = sorted(
        (row.batch_size, row.context_tokens, row.decode_ratio_to_baseline)
        for row in report.speed
        if row.key == (MODEL, "default") and row.decode_ratio_to_baseline is not None
    )
    timed = [row for row in timed if row[0] == timed[0][0]]
    if timed:
        spans = ", ".join(f"{ratio:.2f} × at {context:,}" for _, context, ratio in timed)
        fast = next((context for _, context, ratio in timed if ratio >= 1), None)
        since = "at none of the measured contexts" if fast is None else f"from {fast:,} tokens on"
        said.append(f"It decodes as fast as the source {since} ({spans}).")
    return " ".join(said)
