"""The verdicts of a conversion and of a training in words, and the command to run next."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass

from optimum_mla.report.render import divergence
from optimum_mla.report.schema import ConversionReport, RecoveryReport

NOTHING, SMALL, LARGE, BROKEN = range(4)
"""How much a conversion cost, from nothing that matters to a model that is of no use."""
RISES = (0.01, 0.05, 1.0)
"""Relative rise of the perplexity up to which the cost is nothing, small and large."""
OTHER_GUESSES = (2.0, 5.0, 50.0)
"""Percent of the tokens of the source's own answers with another likeliest token, up to which the cost is the same."""
DIVERGENCES = (0.01, 0.05, 1.0)
"""Mean divergence of the predictions on these answers, in nats, up to which the cost is the same."""
JUDGEMENTS = {
    NOTHING: "The model is as good as before.",
    SMALL: "That is a small loss: a few answers will differ, and training can win it back.",
    LARGE: "That is a large loss: {remedy}.",
    BROKEN: "The model is broken: {remedy}.",
}
REMEDIES = {
    "native": "train the model with mla-finetune before you use it, or keep more of the cache",
    "wrapper": "keep more of the cache, or convert the language model alone and train it with mla-finetune",
}
"""The advice about a large loss, by the form that was written. All forms that are not here get `EXPORTED`."""
EXPORTED = "keep more of the cache, or convert without the export, train with mla-finetune, and export the result"


@dataclass(frozen=True)
class Cost:
    """How much a conversion cost by one measure.

    Attributes:
        level: `NOTHING`, `SMALL`, `LARGE` or `BROKEN`.
        words: The measure and its value, as a clause.
    """

    level: int
    words: str


def costs(report: ConversionReport) -> list[Cost]:
    """Return what a conversion cost by each measure that was taken: the perplexity, and the source's own answers."""
    found = []
    before, after = report.perplexity_before, report.perplexity_after
    if before is not None and after is not None:
        words = f"on the {report.perplexity_text} text the perplexity went from {before:.4g} to {after:.4g}"
        rise = after / before - 1
        found.append(Cost(_level(rise, RISES), f"{words} ({100 * rise:+.1f} %)" if math.isfinite(rise) else words))
    if report.answers is not None:
        other, divergence = 100 - report.answers["same_guess_percent"], report.answers["divergence_nats"]
        level = max(_level(other, OTHER_GUESSES), _level(divergence, DIVERGENCES))
        words = f"on the source's own answers {other:.1f} % of the first guesses changed"
        found.append(Cost(level, f"{words} (divergence {divergence:.2g} nats)"))
    return found


def _judgement(report: ConversionReport, level: int) -> str:
    """Return what a cost means, and what to do about it."""
    return JUDGEMENTS[level].format(remedy=REMEDIES.get(report.written_as, EXPORTED))


def _level(value: float, limits: tuple[float, float, float]) -> int:
    """Return the cost of a value, which is `BROKEN` where it is no number."""
    return next((level for level, limit in enumerate(limits) if value <= limit), BROKEN)


def verdict(report: ConversionReport) -> str:
    """Return a few sentences that say what the conversion saved and what it cost, by the worst of its measures."""
    saved = f"The cache is {report.cache_percent_of_source:.3g} % of the source's in 16 bits."
    found = costs(report)
    if not found:
        return f"{saved} What that costs in quality was not measured, as there was no text."
    said = "; ".join(cost.words for cost in found)
    return f"{saved} {said[0].upper()}{said[1:]}. {_judgement(report, max(cost.level for cost in found))}"


def quality_warning(report: ConversionReport) -> str | None:
    """Return one line about a conversion that cost more than a small loss by some measure, or None."""
    found = costs(report)
    worst = max((cost.level for cost in found), default=NOTHING)
    if worst < LARGE:
        return None
    said = "; ".join(cost.words for cost in found if cost.level == worst)
    return f"warning: {said}. {_judgement(report, worst)}"


def next_command(report: ConversionReport, output: str) -> str | None:
    """Return the command that a user would run next on the result, or None where no command takes it.

    Args:
        report: The report of the conversion.
        output: The folder of the result.
    """
    folder = shlex.quote(output.rstrip("/"))
    if report.written_as == "gguf":
        return f"llama-cli -m {folder}/*.gguf"
    if report.written_as == "wrapper":
        return None
    measure = (
        f"optimum-cli mla-benchmark -m {folder} --baseline {shlex.quote(report.model)} --eval-data TEXT {folder}-report"
    )
    found = costs(report)
    if not found or report.written_as != "native":
        return measure
    if max(cost.level for cost in found) > NOTHING:
        return f"optimum-cli mla-finetune -m {folder} --train-data TEXT --merge {folder}-recovered"
    return f"optimum-cli mla-quantize -m {folder} --cache-bits 4 {folder}-int4"


def recovery_verdict(report: RecoveryReport) -> str:
    """Return what a training brought in one or two sentences, or how to find out.

    They begin with `warning` where the training made the model worse on held-out text, whether or not the result was
    kept.
    """
    before, after = report.perplexity_converted, report.perplexity_recovered
    if before is None or after is None:
        return "What the training brought was not measured. Give held-out text with --eval-data."
    held_back = report.perplexity_text == "held-back training"
    text = "text held back from the training data" if held_back else "the evaluation text"
    remedy = "Take a lower --learning-rate, more text, or text more like what the model is for."
    measured = {entry["step"]: entry["perplexity"] for entry in report.perplexities}
    last = max(measured, default=0)
    what = "divergence from the teacher through the cache" if report.as_used else "perplexity"

    def shown(perplexity: float) -> str:
        return f"{divergence(perplexity):.4f} nats" if report.as_used else f"{perplexity:.2f}"

    if report.kept_step == 0:
        best = min(measured, key=lambda step: measured[step])
        found = "worse" if measured[best] > before else "no better"
        return (
            f"warning: the training made the model {found}: its {what} on {text} was {shown(before)} before, and at "
            f"best {shown(measured[best])} after {best} of {last} steps. The model is saved as it was given. {remedy}"
        )
    change = f"the {what} on {text} from {shown(before)} to {shown(after)}"
    if after > before:
        return f"warning: the training made the model worse: it raised {change}. {remedy}"
    brought = f"The training brought {change}"
    if report.kept_step is not None and report.kept_step < last:
        kept = report.kept_step
        return (
            f"{brought} after {kept} steps, whose weights are saved. After {last} steps it was {shown(measured[last])}."
        )
    return f"{brought}."
