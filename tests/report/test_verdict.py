"""The words at the end of a conversion and of a training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from optimum_mla.report.break_even import break_even_tokens
from optimum_mla.report.schema import ConversionReport, RecoveryReport
from optimum_mla.report.verdict import (
    JUDGEMENTS,
    REMEDIES,
    conversion_verdict,
    costs,
    next_command,
    quality_warning,
    recovery_verdict,
)

CONVERSION = ConversionReport(
    model="m", method="gqa2mla", options={}, data={}, cache_numbers_per_token_per_layer=1.0, cache_bytes_per_token=1.0,
    source_cache_bytes_per_token=4.0, predicted_cache_bytes_per_token=1.0, cache_percent_of_source=25.0,
    parameters_added=0, perplexity_before=20.0, perplexity_after=20.0, conversion_seconds=1.0, peak_memory_bytes=1,
    dtype="float32", seed=0, layers=[], perplexity_text="evaluation",
)  # fmt: skip


def answered(changed: float, divergence: float) -> dict[str, float]:
    """The report's entry about answers of which so many percent of the first guesses changed."""
    return {"same_guess_percent": 100 - changed, "divergence_nats": divergence, "tokens": 200}


@pytest.mark.parametrize(
    ("after", "answers", "level", "words"),
    [
        (20.1, None, 0, "n the evaluation text the perplexity went from 20 to 20.1 (+0.5 %)"),
        (20.1, answered(1.0, 0.002), 0, "1.0 % of the first guesses changed (divergence 0.002 nats)"),
        (20.6, None, 1, "(+3.0 %)"),
        (19.0, answered(4.0, 0.02), 1, "4.0 % of the first guesses changed"),
        (21.3, None, 2, "(+6.5 %)"),
        # What was praised as a small loss: the perplexity hardly rises, and the answers are other ones.
        (20.5, answered(14.0, 0.08), 2, "14.0 % of the first guesses changed (divergence 0.08 nats)"),
        (20.1, answered(1.0, 0.2), 2, "divergence 0.2 nats"),
        (30179.0, None, 3, "from 20 to 3.018e+04"),
        (float("inf"), None, 3, "from 20 to inf."),
        (float("nan"), None, 3, "from 20 to nan."),
        (20.0, answered(80.0, 3.0), 3, "80.0 % of the first guesses changed"),
    ],
)
def test_a_conversion_is_judged_by_the_worst_of_what_was_measured(
    after: float, answers: dict[str, float] | None, level: int, words: str
) -> None:
    report = replace(CONVERSION, perplexity_after=after, answers=answers)
    text, warning = conversion_verdict(report), quality_warning(report)
    assert text.startswith("The cache is 25 % of the source's in 16 bits. On the ")
    assert words in text
    judgement = JUDGEMENTS[level].format(remedy=REMEDIES["native"])
    assert text.endswith(judgement)
    assert max(costs(report))[0] == level
    assert (warning is None) == (level < 2)
    if warning is not None:
        assert words.rstrip(".") in warning
        assert warning.endswith(judgement)
        assert all((said in warning) == (found == level) for found, said in costs(report))


def test_what_was_not_measured_is_not_judged() -> None:
    report = replace(CONVERSION, perplexity_before=None, perplexity_after=None)
    assert "was not measured, as there was no text" in conversion_verdict(report)
    assert quality_warning(report) is None


@pytest.mark.parametrize(
    ("changes", "command"),
    [
        ({}, "optimum-cli mla-quantize -m out --cache-bits 4 out-int4"),
        ({"perplexity_after": 21.0}, "optimum-cli mla-finetune -m out --train-data TEXT --merge out-recovered"),
        ({"answers": answered(14.0, 0.1)}, "optimum-cli mla-finetune -m out --train-data TEXT --merge out-recovered"),
        ({"perplexity_before": None}, "optimum-cli mla-benchmark -m out --baseline m --eval-data TEXT out-report"),
        (
            {"written_as": "deepseek_v3", "perplexity_after": 30.0},
            "optimum-cli mla-benchmark -m out --baseline m --eval-data TEXT out-report",
        ),
        ({"written_as": "gguf"}, "llama-cli -m out/*.gguf"),
        ({"written_as": "wrapper"}, None),
    ],
)
def test_the_next_command_is_one_that_takes_the_result(changes: dict[str, Any], command: str | None) -> None:
    assert next_command(replace(CONVERSION, **changes), "out/") == command


def test_folders_with_spaces_can_be_pasted() -> None:
    assert (
        next_command(CONVERSION, "my model") == "optimum-cli mla-quantize -m 'my model' --cache-bits 4 'my model'-int4"
    )


def test_a_training_that_made_it_worse_is_said() -> None:
    report = RecoveryReport.__new__(RecoveryReport)
    for name, value in {"perplexities": [], "kept_step": None, "perplexity_text": "evaluation"}.items():
        object.__setattr__(report, name, value)
    for before, after, words in (
        (
            36.5,
            40.4,
            "warning: the training made the model worse: it raised the perplexity on the evaluation text from 36.50",
        ),
        (36.5, 30.0, "brought the perplexity on the evaluation text from 36.50 to 30.00"),
        (None, None, "not measured"),
    ):
        object.__setattr__(report, "perplexity_converted", before)
        object.__setattr__(report, "perplexity_recovered", after)
        assert words in recovery_verdict(report)


@pytest.mark.parametrize(
    ("kept", "after", "perplexities", "words"),
    [
        (0, 36.5, (40.0, 37.25, 39.0), "warning: the training made the model worse: its perplexity on the evaluation "),
        (
            0,
            36.5,
            (40.0, 37.25, 39.0),
            "was 36.50 before, and at best 37.25 after 20 of 30 steps. The model is saved as",
        ),
        (0, 36.5, (36.5, 36.5, 36.5), "warning: the training made the model no better: its perplexity on the evaluat"),
        (
            20,
            30.0,
            (33.0, 30.0, 31.5),
            "from 36.50 to 30.00 after 20 steps, whose weights are saved. After 30 steps it",
        ),
        (20, 30.0, (33.0, 30.0, 31.5), "whose weights are saved. After 30 steps it was 31.50."),
        (
            30,
            29.0,
            (33.0, 30.0, 29.0),
            "The training brought the perplexity on the evaluation text from 36.50 to 29.00.",
        ),
        (None, 29.0, (), "The training brought the perplexity on the evaluation text from 36.50 to 29.00."),
    ],
)
def test_the_step_that_was_kept_is_said(
    kept: int | None, after: float, perplexities: tuple[float, ...], words: str
) -> None:
    report = RecoveryReport.__new__(RecoveryReport)
    measured = [{"step": 10 * (n + 1), "perplexity": value} for n, value in enumerate(perplexities)]
    fields = {"perplexity_converted": 36.5, "perplexity_recovered": after, "perplexities": measured, "kept_step": kept}
    for name, value in {**fields, "perplexity_text": "evaluation"}.items():
        object.__setattr__(report, name, value)
    assert words in recovery_verdict(report)
    object.__setattr__(report, "perplexity_text", "held-back training")
    assert "text held back from the training data" in recovery_verdict(report)


def test_the_break_even_context() -> None:
    assert break_even_tokens(1000, 10) == 100
    assert break_even_tokens(1001, 10) == 101
    assert break_even_tokens(-5, 10) == break_even_tokens(0, 0) == 0
    assert break_even_tokens(5, 0) is break_even_tokens(5, -1) is None


@pytest.mark.parametrize("form", ["gguf", "deepseek_v3", "wrapper"])
def test_nobody_is_told_to_train_what_cannot_be_trained(form: str) -> None:
    text = conversion_verdict(replace(CONVERSION, perplexity_before=20.0, perplexity_after=30.0, written_as=form))
    assert "train the model with mla-finetune before you use it" not in text
    assert "keep more of the cache" in text
    assert "{" not in text
