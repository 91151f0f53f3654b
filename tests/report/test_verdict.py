"""The words at the end of a conversion and of a training."""

from __future__ import annotations

from dataclasses import replace

import pytest

from optimum_mla.report.break_even import break_even_tokens, tokens_text
from optimum_mla.report.schema import ConversionReport, RecoveryReport
from optimum_mla.report.verdict import next_command, recovery_verdict, verdict

CONVERSION = ConversionReport(
    model="m", method="gqa2mla", options={}, data={}, cache_numbers_per_token_per_layer=1.0, cache_bytes_per_token=1.0,
    source_cache_bytes_per_token=4.0, predicted_cache_bytes_per_token=1.0, cache_percent_of_source=25.0,
    parameters_added=0, perplexity_before=20.0, perplexity_after=20.0, conversion_seconds=1.0, peak_memory_bytes=1,
    dtype="float32", seed=0, layers=[], perplexity_text="evaluation",
)  # fmt: skip


@pytest.mark.parametrize(
    ("after", "words", "command"),
    [
        (20.1, "as good as before (+0.5 % perplexity)", "mla-quantize -m out --cache-bits 4 out-int4"),
        (21.0, "for 5.0 % more perplexity on the evaluation text: a small loss", "mla-finetune -m out "),
        (25.0, "25 % more perplexity on the evaluation text: train it before you use it", "mla-finetune -m out "),
        (
            30179.0,
            "the model is broken: its perplexity on the evaluation text rose from 20 to 3.018e+04",
            "mla-finetune",
        ),
        (float("inf"), "the model is broken", "mla-finetune"),
        (None, "was not measured", "mla-benchmark -m out"),
    ],
)
def test_a_conversion_is_judged_by_the_rise_of_its_perplexity(after: float | None, words: str, command: str) -> None:
    report = replace(CONVERSION, perplexity_after=after)
    assert words in verdict(report)
    assert verdict(report).startswith("The cache is 25 % of the source's")
    assert f"optimum-cli {command}" in next_command(report, "out/")


def test_folders_with_spaces_can_be_pasted() -> None:
    assert next_command(CONVERSION, "my model").startswith("optimum-cli mla-quantize -m 'my model' ")


def test_a_training_that_made_it_worse_is_said() -> None:
    report = RecoveryReport.__new__(RecoveryReport)
    for before, after, words in (
        (
            36.5,
            40.4,
            "warning: the training made the model worse: its perplexity on the evaluation text rose from 36.50",
        ),
        (36.5, 30.0, "brought the perplexity on the evaluation text from 36.50 to 30.00"),
        (None, None, "not measured"),
    ):
        object.__setattr__(report, "perplexity_converted", before)
        object.__setattr__(report, "perplexity_recovered", after)
        assert words in recovery_verdict(report)


def test_the_break_even_context() -> None:
    assert break_even_tokens(1000, 10) == 100
    assert break_even_tokens(1001, 10) == 101
    assert break_even_tokens(-5, 10) == break_even_tokens(0, 0) == 0
    assert break_even_tokens(5, 0) is break_even_tokens(5, -1) is None
    assert [tokens_text(value) for value in (1234, 0, None)] == ["1,234", "0", "never"]
