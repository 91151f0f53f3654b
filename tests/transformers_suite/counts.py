"""What the tests of Transformers gave, as a JSON that a complete run writes and a page that is made from it.

`python -m tests.transformers_suite.counts` makes the page again from the JSON.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from tests.transformers_suite.families import DESCRIPTIONS, FAMILIES, FORMS, KINDS, SOURCE, Kind
from tests.transformers_suite.fetch import VERSION
from tests.transformers_suite.modes import MODES
from tests.transformers_suite.overrides import OVERRIDES

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "transformers_suite.json"
PAGE = ROOT / "docs" / "transformers_suite.md"
COUNTED = ("source_passed", "passed", "overridden", "missing", "skipped", "failed")

HEADINGS = {
    "base model: source": ("ours", "overridden", "missing"),
    "language model: source": ("ours", "overridden", "missing"),
}
"""Columns of the page's table, for each of `KINDS`."""

INTRODUCTION = """# Transformers' own tests on our classes

The source distribution of Transformers carries the tests that every model in the library has to pass: saving and
loading, gradients, attention implementations, resizing, offloading, training, FSDP and tensor parallelism.
`make transformers-tests` fetches those of the installed release into an ignored folder. `make test-slow` runs each of
them on the source class and on ours, for every family and every form of the attention; `make test` runs a selection.
**Every test that passes for the source class has to pass for ours**, or a test of ours stands in its place.

Left out are the mixin of pipelines, which takes its models from the Hub, that of expert parallelism, which is for
mixtures of experts, and the tests of tokenizers and processors, which a conversion does not touch.
"""

MATRIX = """## Generation, caches and exporters

What the distribution lacks is a matrix of our own: `tests/transformers_suite/test_modes.py` runs each of these modes on
the source class and on ours, for every family and form. A mode has to give what the model gives in a plainer way, most
often without any cache, and a model converted at full rank has to give what its source gives.
"""


def record(cases: Iterable[tuple[str, str, Kind, str]]) -> None:
    """Write the counts and the page if every case has run.

    Args:
        cases: Family, form, kind and name of every test.
    """
    from tests.transformers_suite.outcomes import known

    counts: dict[tuple[str, str, Kind], Counter[str]] = {}
    skips: Counter[str] = Counter()
    for family, form, kind, name in cases:
        source, ours = known(family, SOURCE, kind, name), known(family, form, kind, name)
        if source is None or ours is None:
            return
        row = counts.setdefault((family, form, kind), Counter())
        row["source_passed"] += source.status == "passed"
        overridden = source.status == "passed" and name in OVERRIDES
        row["overridden" if overridden else ours.status] += 1
        row["missing"] += source.status == "passed" and not overridden and ours.status != "passed"
        if source.status == "skipped" and (family, form) == (FAMILIES[0], next(iter(FORMS))):
            skips[source.reason] += 1
    write(
        {
            "transformers": VERSION,
            "torch": torch.__version__.partition("+")[0],
            "rows": [
                {"family": family, "form": form, "kind": kind, **{name: row[name] for name in COUNTED}}
                for (family, form, kind), row in counts.items()
            ],
            "overrides": {name: override.reason for name, override in OVERRIDES.items()},
            "source_skips": dict(sorted(skips.items(), key=lambda item: (-item[1], item[0]))),
        }
    )


def write(results: dict[str, Any]) -> None:
    """Write the JSON and the page."""
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    PAGE.write_text(page(results), encoding="utf-8")


def page(results: dict[str, Any]) -> str:
    """Return the page that belongs to the counts."""
    lines = [
        INTRODUCTION,
        f"## Transformers {results['transformers']}, torch {results['torch']}, CPU",
        "",
        "A test is counted once for each class. *Source* is the number of tests that pass for the source class, *ours*",
        "of those that pass for ours, *overridden* of those that a test of ours stands for, *missing* of those that",
        "pass for the source and neither pass for ours nor are overridden. The rest skip themselves, for the reasons",
        "below.",
        "",
        f"| family | form | {' | '.join(heading for kind in HEADINGS for heading in (kind, *HEADINGS[kind]))} |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    by_case = {(row["family"], row["form"], row["kind"]): row for row in results["rows"]}
    for family in FAMILIES:
        for form in FORMS:
            cells = [
                str(by_case[family, form, kind][name])
                for kind in KINDS
                for name in ("source_passed", "passed", "overridden", "missing")
            ]
            lines.append(f"| {family} | {form} | {' | '.join(cells)} |")
    lines += ["", "The forms:", ""]
    lines += [f"- `{form}`: {text}" for form, text in DESCRIPTIONS.items()]
    lines += ["", MATRIX]
    lines += [f"- {mode}" for mode in MODES]
    lines += ["", "## Overridden", ""]
    lines += [f"- `{name}`: {reason}" for name, reason in results["overrides"].items()]
    lines += ["", "## Why tests skip themselves for the source class", "", "| reason | tests |", "|---|---|"]
    lines += [
        f"| {' '.join(reason.split()).replace('|', '/')} | {n} |" for reason, n in results["source_skips"].items()
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(json.loads(RESULTS.read_text(encoding="utf-8"))), encoding="utf-8")
