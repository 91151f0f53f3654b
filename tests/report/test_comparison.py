"""The verdict of a benchmark compares sizes and perplexities of the model and of its source's own quantized caches."""

from __future__ import annotations

from dataclasses import replace

import pytest

from optimum_mla.report.comparison import break_even, places, verdict
from optimum_mla.report.rows import BenchmarkReport, BudgetRow, QualityRow, SpeedRow


def report(rows: dict[tuple[str, str], tuple[float, float]]) -> BenchmarkReport:
    """A report with bytes per token and a perplexity for each role and cache."""
    budget = [BudgetRow(role, cache, size, 0.0, 1, 1, 1, 1) for (role, cache), (size, _) in rows.items()]
    quality = [QualityRow(role, cache, value) for (role, cache), (_, value) in rows.items()]
    return BenchmarkReport(
        "m", "s", {}, {}, "bfloat16", "cpu", None, None, None, 1, budget=budget, quality=quality, threads=1
    )


WHOLE = {("baseline", "default"): (1000.0, 20.0)}
HQQ = ("baseline", "hqq-int4")
MODEL = ("model", "default")


def test_places_are_shares_of_the_unquantized_baseline() -> None:
    found = places(report({**WHOLE, HQQ: (281.25, 21.0), MODEL: (250.0, 22.0)}))
    assert [(one.role, one.cache, one.percent, one.perplexity) for one in found] == [
        ("baseline", "default", 100.0, 20.0),
        ("baseline", "hqq-int4", 28.125, 21.0),
        ("model", "default", 25.0, 22.0),
    ]


@pytest.mark.parametrize(
    ("model", "theirs", "ending"),
    [
        ((250.0, 20.4), (281.0, 21.0), "it is worth it."),
        ((500.0, 21.5), (281.0, 21.0), "converting is not worth it."),
        ((250.0, 22.0), (281.0, 21.0), "Neither is better in both size and quality."),
    ],
)
def test_the_verdict_follows_from_size_and_perplexity(
    model: tuple[float, float], theirs: tuple[float, float], ending: str
) -> None:
    text = verdict(report({**WHOLE, HQQ: theirs, MODEL: model}))
    assert text.endswith(ending)
    assert f"{model[0] / 10:.1f} % of the source's bytes per token for {100 * (model[1] / 20 - 1):+.1f} %" in text
    assert f"{theirs[0] / 10:.1f} % of the source's bytes" in text


def test_the_smallest_cache_that_is_not_beaten_is_the_one_to_judge() -> None:
    rows = {**WHOLE, HQQ: (281.0, 21.0), MODEL: (250.0, 20.4), ("model", "hqq-int4"): (80.0, 20.9)}
    assert verdict(report(rows)).startswith("The model with the cache hqq-int4 keeps 8.0 %")
    rows["model", "hqq-int4"] = (290.0, 25.0)
    assert verdict(report(rows)).startswith("The model keeps 25.0 %")


def test_there_is_no_verdict_without_a_measured_pair() -> None:
    assert verdict(report({MODEL: (250.0, 20.0)})) == ""
    assert verdict(report(WHOLE)) == ""
    alone = verdict(report({**WHOLE, MODEL: (250.0, 20.0)}))
    assert alone == "The model keeps 25.0 % of the source's bytes per token for +0.0 % perplexity."


def test_the_break_even_counts_weights_and_measured_speed() -> None:
    plain = report({**WHOLE, MODEL: (250.0, 20.0)})
    whole, model = plain.budget
    grown = replace(plain, budget=[whole, replace(model, weight_bytes=whole.weight_bytes + 1500)])
    assert break_even(grown) == "It takes less memory than the source from 2 tokens in the cache on."
    larger = replace(plain, budget=[whole, replace(model, weight_bytes=10**6, cache_bytes_per_token=1000.0)])
    assert break_even(larger) == "With its larger weights it never takes less memory than the source."

    def timed(context: int, batch: int, ratio: float) -> SpeedRow:
        return SpeedRow("model", "default", context, batch, decode_ratio_to_baseline=ratio)

    rows = [timed(4096, 1, 1.1), timed(1024, 1, 0.8), timed(1024, 8, 3.0)]
    fast = break_even(replace(plain, speed=rows))
    assert fast == "It decodes as fast as the source from 4,096 tokens on (0.80 × at 1,024, 1.10 × at 4,096)."
    slow = break_even(replace(plain, speed=rows[1:]))
    assert slow == "It decodes as fast as the source at none of the measured contexts (0.80 × at 1,024)."
