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


@dataclass(frozen=True)
class Place:
    """The size, the quality and the speed of one model with one cache.

    Attributes:
        role: `model` or `baseline`.
        cache: Name of the cache.
        percent: Bytes per token in percent of those of the baseline with its unquantized 16-bit cache.
        perplexity: Perplexity on the evaluation text.
        divergence: Mean divergence of its predictions from the baseline's in nats; None where it was not measured.
        stderr: Standard error of that, or None for a single window.
        speed: Decoding speed at the smallest batch and the longest context, as a ratio to the baseline's, or None.
        spread: Relative distance between the quartiles of the times behind it.
    """

    role: str
    cache: str
    percent: float
    perplexity: float
    divergence: float | None = None
    stderr: float | None = None
    speed: float | None = None
    spread: float = 0.0

    @property
    def name(self) -> str:
        """Return the name of the model with its cache, as in a sentence."""
        who = "the source" if self.role == BASELINE else "the model"
        return who if self.cache == "default" else f"{who} with the cache {self.cache}"


def places(report: BenchmarkReport) -> list[Place]:
    """Return the bytes, the quality and the speed of every model and cache of which bytes and quality were measured."""
    sizes = {(row.role, row.cache): row.shared_bytes for row in report.budget}
    whole = sizes.get((BASELINE, "default"))
    if not whole:
        return []
    found = []
    for row in report.quality:
        key = (row.role, row.cache)
        if row.perplexity is None or sizes.get(key, 0) <= 0:
            continue
        timed = [one for one in report.speed if (one.role, one.cache) == key and one.decode_ratio_to_baseline]
        last = max(timed, key=lambda one: (-one.batch_size, one.context_tokens), default=None)
        found.append(
            Place(
                *key,
                100 * sizes[key] / whole,
                row.perplexity,
                row.kl_nats,
                row.kl_stderr_nats,
                None if last is None else last.decode_ratio_to_baseline,
                0.0 if last is None else (last.decode_spread_percent or 0.0) / 100,
            )
        )
    return found


@dataclass(frozen=True)
class Difference:
    """A comparison of two places: 1 where the first is better, -1 where it is worse, 0 where no difference is certain.

    Attributes:
        size: Bytes per token.
        quality: Divergence from the source, beyond the standard errors; None where they are not known.
        speed: Decoding speed, beyond the spread of the times; None where it was not measured.
    """

    size: int
    quality: int | None
    speed: int | None

    @classmethod
    def between(cls, one: Place, other: Place) -> Difference:
        """Return the difference between two places."""
        quality = speed = None
        if None not in (one.divergence, other.divergence, one.stderr, other.stderr):
            unsure = CERTAIN * math.hypot(one.stderr or 0.0, other.stderr or 0.0)
            quality = _sign((other.divergence or 0.0) - (one.divergence or 0.0), unsure)
        if one.speed is not None and other.speed is not None:
            speed = _sign(one.speed - other.speed, max(SAME_SPEED, one.spread, other.spread) * other.speed)
        return cls(_sign(other.percent - one.percent, SAME_SIZE * other.percent), quality, speed)

    @property
    def known(self) -> list[int]:
        """Return what is known of size, quality and speed."""
        return [value for value in (self.size, self.quality, self.speed) if value is not None]

    @property
    def ahead(self) -> bool:
        """Return whether the quality is known, something is better, and nothing is worse."""
        return self.quality is not None and max(self.known) > 0 and min(self.known) >= 0

    def words(self) -> str:
        """Return the difference as words, with what is better first."""
        said = [
            (self.size, {1: "smaller", 0: "as large", -1: "larger"}),
            (self.quality, {1: "closer to the source", 0: "as close to it within the error", -1: "further from it"}),
            (self.speed, {1: "faster", 0: "as fast within the spread", -1: "slower"}),
        ]
        good = [words[value] for value, words in said if value is not None and value >= 0]
        bad = [words[value] for value, words in said if value == -1]
        return " but ".join(", ".join(part) for part in (good, bad) if part)


def _sign(difference: float, unsure: float) -> int:
    return 0 if abs(difference) <= unsure else 1 if difference > 0 else -1


def verdict(report: BenchmarkReport) -> str:
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
    standing = [one for one in own if not any(Difference.between(other, one).ahead for other in theirs)]
    best = min(standing or own, key=lambda one: one.percent)
    text = f"{_capital(best.name)} keeps {_cost(best, whole)}."
    if not theirs:
        return text
    preferable = [one for one in theirs if Difference.between(one, best).ahead]
    near = min(preferable or theirs, key=lambda one: (abs(one.percent - best.percent), one.perplexity))
    apart = Difference.between(best, near)
    text += f" {_capital(near.name)} keeps {_cost(near, whole)}. Beside it, the model is {apart.words()}"
    if apart.quality is None:
        return f"{text}. Quality is not compared: it needs more than one window and the same tokens."
    if preferable:
        return f"{text}: converting is not worth it."
    if apart.ahead:
        return f"{text}: converting is worth it."
    return f"{text}: neither is better in everything that was measured."


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


def _cost(place: Place, whole: Place) -> str:
    rise = 100 * (place.perplexity / whole.perplexity - 1)
    said = [f"{place.percent:.1f} % of the source's bytes per token for {rise:+.1f} % perplexity"]
    if place.divergence is not None:
        error = "" if place.stderr is None else f" ± {place.stderr:.2g}"
        said.append(f"a divergence of {place.divergence:.2g}{error} nats")
    if place.speed is not None:
        said.append(f"{place.speed:.2f} × the source's decoding speed")
    return ", ".join(said[:-1]) + f" and {said[-1]}" if len(said) > 1 else said[0]


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
