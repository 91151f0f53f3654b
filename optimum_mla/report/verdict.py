"""The verdicts of a conversion and of a training in words, and the command to run next."""

from __future__ import annotations

import math
import shlex

from optimum_mla.report.render import divergence
from optimum_mla.report.schema import CodecReport, ConversionReport, RecoveryReport

NOTHING, SMALL, LARGE, BROKEN = range(4)
"""How much a conversion cost, from nothing that matters to a model that is of no use."""
RISES = (0.01, 0.05, 1.0)
"""Relative rise of the perplexity up to which the cost is nothing, small and large."""
OTHER_GUESSES = (2.0, 5.0, 50.0)
"""Percent of the tokens of the source's own answers with another likeliest token, up to which the cost is the same."""
DIVERGENCES = (0.01, 0.05, 1.0)
"""Mean divergence of the predictions in nats, up to which the cost is the same."""
JUDGEMENTS = {
    NOTHING: "The model is as good as before.",
    SMALL: "That is a small loss: a few answers will differ, and training can win it back.",
    LARGE: "That is a large loss: {remedy}.",
    BROKEN: "The model is broken: {remedy}.",
}
CODEC_JUDGEMENTS = {
    NOTHING: JUDGEMENTS[NOTHING],
    SMALL: "That is a small loss: a few answers will differ.",
    LARGE: "That is a large loss: give a larger --cache-budget, or calibration text like what the model will read.",
}
REMEDIES = {
    "native": "train the model with mla-finetune before you use it, or keep more of the cache",
    "wrapper": "keep more of the cache, or convert the language model alone and train it with mla-finetune",
    "export": "keep more of the cache, or convert without the export, train with mla-finetune, and export the result",
}
"""The advice about a large loss, by the form that was written; all forms that are not here are exports."""


def costs(report: ConversionReport) -> list[tuple[int, str]]:
    """Return what a conversion cost by each measure that was taken: the perplexity, and the source's own answers.

    Returns:
        For each measure `NOTHING`, `SMALL`, `LARGE` or `BROKEN`, and the measure with its value as a clause.
    """
    found = []
    before, after = report.perplexity_before, report.perplexity_after
    if before is not None and after is not None:
        words = f"on the {report.perplexity_text} text the perplexity went from {before:.4g} to {after:.4g}"
        rise = after / before - 1
        found.append((_level(rise, RISES), f"{words} ({100 * rise:+.1f} %)" if math.isfinite(rise) else words))
    if report.answers is not None:
        other, moved = 100 - report.answers["same_guess_percent"], report.answers["divergence_nats"]
        words = f"on the source's own answers {other:.1f} % of the first guesses changed (divergence {moved:.2g} nats)"
        found.append((max(_level(other, OTHER_GUESSES), _level(moved, DIVERGENCES)), words))
    return found


def _level(value: float, limits: tuple[float, float, float]) -> int:
    """Return the cost of a value, which is `BROKEN` where it is no number."""
    return next((level for level, limit in enumerate(limits) if value <= limit), BROKEN)


def _judgement(report: ConversionReport, level: int) -> str:
    """Return what a cost means, and what to do about it."""
    return JUDGEMENTS[level].format(remedy=REMEDIES.get(report.written_as, REMEDIES["export"]))


def conversion_verdict(report: ConversionReport | CodecReport) -> str:
    """Return a few sentences that say what a conversion saved and what it cost, by the worst of its measures."""
    if isinstance(report, CodecReport):
        return codec_verdict(report)
    saved = f"The cache is {report.cache_percent_of_source:.3g} % of the source's in 16 bits."
    found = costs(report)
    if not found:
        return f"{saved} What that costs in quality was not measured, as there was no text."
    said = "; ".join(words for _, words in found)
    return f"{saved} {said[0].upper()}{said[1:]}. {_judgement(report, max(found)[0])}"


def quality_warning(report: ConversionReport) -> str | None:
    """Return one line about a conversion that cost more than a small loss by some measure, or None."""
    found = costs(report)
    worst = max(found, default=(NOTHING, ""))[0]
    if worst < LARGE:
        return None
    said = "; ".join(words for level, words in found if level == worst)
    return f"warning: {said}. {_judgement(report, worst)}"


def codec_verdict(report: CodecReport) -> str:
    """Return a few sentences that say what a codec saves, what it costs, and what that means."""
    first, newest, together = (report.exact[name] for name in ("sinks", "recent", "together"))
    saved = (
        f"Prompts, the first {first} tokens and the newest {newest} to {newest + together - 1} are read exactly. With "
        f"{report.stated_tokens:,} tokens the cache takes {report.percent_at_stated_tokens:.3g} % of the source's in "
        f"16 bits, and {report.percent_of_long_caches:.3g} % when it is long."
    )
    if report.divergence_nats is None:
        return f"{saved} What that costs in quality was not measured, as there was no text in windows long enough."
    level = min(_level(report.divergence_nats, DIVERGENCES), LARGE)
    return (
        f"{saved} After a prompt of {report.prompt_tokens} tokens of the {report.quality_text} text the predictions "
        f"moved by {report.divergence_nats:.2g} nats, and {100 - (report.same_guess_percent or 0):.1f} % of the first "
        f"guesses changed. {CODEC_JUDGEMENTS[level]}"
    )


def next_command(report: ConversionReport | CodecReport, output: str) -> str | None:
    """Return the command, or the words, about what a user would do next with the result; None where there is nothing.

    Args:
        report: The report of the conversion.
        output: The folder of the result.
    """
    folder = shlex.quote(output.rstrip("/"))
    source = shlex.quote(report.model)
    measure = f"optimum-cli mla-benchmark -m {folder} --baseline {source} --eval-data TEXT {folder}-report"
    if isinstance(report, CodecReport):
        alone = f"load it in Python by optimum_mla.load_codec(model, {output!r}), as its README.md shows."
        return alone if report.written_as == "codec" else measure
    if report.written_as == "wrapper":
        return None
    if report.written_as == "gguf":
        return f"llama-cli -m {folder}/*.gguf"
    found = costs(report)
    if report.written_as != "native" or not found:
        return measure
    if max(found)[0] > NOTHING:
        return f"optimum-cli mla-finetune -m {folder} --train-data TEXT --merge {folder}-recovered"
    return f"optimum-cli mla-quantize -m {folder} --cache-bits 4 {folder}-int4"


def recovery_verdict(report: RecoveryReport) -> str:
    """Return what a training brought in one or two sentences, or how to find out.

    They begin with `warning` where the training made the model worse on held-out text, whether or not the result was
    kept.
    """
    before, after, kept = report.perplexity_converted, report.perplexity_recovered, report.kept_step
    if before is None or after is None:
        return "What the training brought was not measured. Give held-out text with --eval-data."
    held_back = report.perplexity_text == "held-back training"
    what = "divergence from the teacher through the cache" if report.as_used else "perplexity"
    what += " on text held back from the training data" if held_back else " on the evaluation text"
    remedy = "Take a lower --learning-rate, more text, or text more like what the model is for."
    measured = {entry["step"]: entry["perplexity"] for entry in report.perplexities}
    last = max(measured, default=0)

    def shown(perplexity: float) -> str:
        return f"{divergence(perplexity):.4f} nats" if report.as_used else f"{perplexity:.2f}"

    if kept == 0:
        best = min(measured, key=lambda step: measured[step])
        found = "worse" if measured[best] > before else "no better"
        return (
            f"warning: the training made the model {found}: its {what} was {shown(before)} before, and at best "
            f"{shown(measured[best])} after {best} of {last} steps. The model is saved as it was given. {remedy}"
        )
    change = f"the {what} from {shown(before)} to {shown(after)}"
    if after > before:
        return f"warning: the training made the model worse: it raised {change}. {remedy}"
    if kept is None or kept >= last:
        return f"The training brought {change}."
    return (
        f"The training brought {change} after {kept} steps, whose weights are saved. "
        f"After {last} steps it was {shown(measured[last])}."
    )
