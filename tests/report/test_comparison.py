"""The verdict of a benchmark compares sizes and perplexities of the model and of its source's own quantized caches."""

from __future__ import annotations

from dataclasses import replace

import pytest

from optimum_mla.report.comparison import benchmark_verdict, break_even, places
from optimum_mla.report.rows import BenchmarkReport, BudgetRow, QualityRow, SpeedRow

Row = tuple[float, float] | tuple[float, float, float, float] | tuple[float, float, float, float, float]


def report(rows: dict[tuple[str, str], Row]) -> BenchmarkReport:
    """A report with bytes, perplexity, divergence with its error, and speed, as far as they are given."""
    budget, quality, speed = [], [], []
    for (role, cache), (size, perplexity, *more) in rows.items():
        budget.append(BudgetRow(role, cache, size, 0.0, 1, 1, 1, 1))
        kl, error = more[:2] or (None, None)
        quality.append(QualityRow(role, cache, perplexity, kl_nats=kl, kl_stderr_nats=error))
        if more[2:]:
            speed.append(SpeedRow(role, cache, 1024, 1, decode_ratio_to_baseline=more[2], decode_spread_percent=1.0))
    return BenchmarkReport(
        **{"model": "m", "baseline": "s", "options": {}, "data": {}, "dtype": "bfloat16", "device": "cpu"},
        **{"memory_budget_bytes": 1, "budget": budget, "quality": quality, "speed": speed},
    )


WHOLE: dict[tuple[str, str], Row] = {("baseline", "default"): (1000.0, 20.0)}
HQQ = ("baseline", "hqq-int4")
KIVI = ("baseline", "kivi-int4-first4")
MODEL = ("model", "default")


def test_places_are_shares_of_the_unquantized_baseline() -> None:
    found = places(report({**WHOLE, HQQ: (281.25, 21.0), MODEL: (250.0, 22.0, 0.1, 0.02, 0.8)}))
    assert [(one.role, one.cache, one.percent, one.perplexity) for one in found] == [
        ("baseline", "default", 100.0, 20.0),
        ("baseline", "hqq-int4", 28.125, 21.0),
        ("model", "default", 25.0, 22.0),
    ]
    assert (found[2].divergence, found[2].stderr, found[2].speed, found[2].spread) == (0.1, 0.02, 0.8, 0.01)
    assert (found[1].divergence, found[1].speed) == (None, None)


def test_shares_count_numbers_in_16_bits() -> None:
    made = report({**WHOLE, MODEL: (250.0, 22.0)})
    budget = [replace(row, cache_bytes_per_token_in_16_bits=row.cache_bytes_per_token / 2) for row in made.budget]
    budget[1] = replace(budget[1], cache_bytes_per_token_in_16_bits=250.0)  # codes weigh the same in every dtype
    assert [one.percent for one in places(replace(made, budget=budget))] == [100.0, 50.0]


@pytest.mark.parametrize(
    ("model", "theirs", "said"),
    [
        # Smaller, closer beyond the error, faster.
        (
            (250.0, 20.4, 0.01, 0.001, 0.9),
            (281.0, 21.0, 0.05, 0.004, 0.4),
            "the model is smaller, closer to the source, faster: converting is worth it.",
        ),
        # Further beyond the error in quality, whatever the perplexity.
        (
            (250.0, 19.9, 0.09, 0.004, 0.9),
            (281.0, 21.0, 0.05, 0.004, 0.4),
            "smaller, faster but further from it: neither is better in everything that was measured.",
        ),
        # A difference within two standard errors is none.
        (
            (250.0, 20.4, 0.052, 0.004, 0.9),
            (281.0, 21.0, 0.05, 0.004, 0.9),
            "smaller, as close to it within the error, as fast within the spread: converting is worth it.",
        ),
        # What was praised: the source's cache is as large, closer and faster.
        (
            (250.0, 20.4, 0.09, 0.004, 0.4),
            (250.0, 20.1, 0.05, 0.004, 0.9),
            "the model is as large but further from it, slower: converting is not worth it.",
        ),
        # Speed counts where it was measured for both.
        (
            (250.0, 20.4, 0.01, 0.001, 0.4),
            (281.0, 20.1, 0.05, 0.004, 0.9),
            "smaller, closer to the source but slower: neither is better in everything that was measured.",
        ),
        (
            (250.0, 20.4, 0.01, 0.001),
            (281.0, 20.1, 0.05, 0.004, 0.9),
            "the model is smaller, closer to the source: converting is worth it.",
        ),
        # Without a standard error nothing is said of the quality.
        ((250.0, 20.4), (281.0, 21.0, 0.05, 0.004), "the model is smaller. Quality is not compared"),
    ],
)
def test_the_verdict_follows_from_size_divergence_and_speed(model: Row, theirs: Row, said: str) -> None:
    text = benchmark_verdict(report({**WHOLE, HQQ: theirs, MODEL: model}))
    assert said in text
    for who, row in (("The model", model), ("The source with the cache hqq-int4", theirs)):
        size = f"{row[0] / 10:.1f} % of the source's bytes per token for {100 * (row[1] / 20 - 1):+.1f} % perplexity"
        assert f"{who} keeps {size}" in text
        if len(row) > 2:
            assert f"a divergence of {row[2]:.2g} ± {row[3]:.2g} nats" in text
        if len(row) > 4:
            assert f"{row[4]:.2f} × the source's decoding speed" in text


def test_the_cache_that_is_named_is_the_one_that_decides() -> None:
    """A better cache of the source is not passed over for one that happens to be nearer in size."""
    rows = {
        **WHOLE,
        HQQ: (255.0, 30.0, 0.4, 0.01, 0.3),
        KIVI: (240.0, 20.1, 0.005, 0.001, 0.9),
        MODEL: (250.0, 20.5, 0.05, 0.002, 0.5),
    }
    text = benchmark_verdict(report(rows))
    assert "The source with the cache kivi-int4-first4 keeps 24.0 %" in text
    assert "hqq" not in text
    assert text.endswith("converting is not worth it.")


def test_the_smallest_cache_that_is_not_beaten_is_the_one_to_judge() -> None:
    small = ("model", "hqq-int4")
    rows = {
        **WHOLE,
        HQQ: (281.0, 21.0, 0.05, 0.001),
        MODEL: (250.0, 20.4, 0.02, 0.001),
        small: (80.0, 20.9, 0.04, 0.001),
    }
    assert benchmark_verdict(report(rows)).startswith("The model with the cache hqq-int4 keeps 8.0 %")
    rows[small] = (290.0, 25.0, 0.2, 0.001)
    assert benchmark_verdict(report(rows)).startswith("The model keeps 25.0 %")


def test_there_is_no_verdict_without_a_measured_pair() -> None:
    assert benchmark_verdict(report({MODEL: (250.0, 20.0)})) == ""
    assert benchmark_verdict(report(WHOLE)) == ""
    alone = benchmark_verdict(report({**WHOLE, MODEL: (250.0, 20.0)}))
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
