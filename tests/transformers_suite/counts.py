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

This page is for those who want to know how far a converted model behaves as a model of Transformers. The source
distribution of Transformers carries the tests that every model in the library has to pass: saving and loading,
gradients, attention implementations, resizing, offloading, training, FSDP and tensor parallelism. We run them on the
class of Transformers, which we call the source class, and on our class of converted models. **Every test that passes
for the source class has to pass for ours**, or a test of ours stands in its place.

`make transformers-tests` fetches the tests of the installed release into an ignored folder. `make test-slow` runs each
of them for every family and every form of the attention, and then writes this page. `make test` runs a selection.

Three groups are left out: the mixin of pipelines, which takes its models from the Hub; the mixin of expert
parallelism, which is for mixtures of experts; and the tests of tokenizers and processors, which a conversion does not
touch.
"""

MATRIX = """## Generation, caches and exporters

For what the distribution has no tests of, there is a matrix of our own. `tests/transformers_suite/test_modes.py` runs
each mode of the list below on the source class and on ours, for every family and form; the exporters, which are the
slowest, run for Llama and Qwen3 only. A mode has to give what the model gives in a plainer way, most often without any
cache. A model converted at full rank has to give what its source gives.
"""


def record(cases: Iterable[tuple[str, str, Kind, str]]) -> None:
    """Write the counts and the page of every family and form whose cases have all run.

    Those of the others stay, if they were counted with the same versions.

    Args:
        cases: Family, form, kind and name of every test.
    """
    from tests.transformers_suite.outcomes import known

    counts: dict[tuple[str, str, Kind], Counter[str]] = {}
    skips: Counter[str] = Counter()
    partial: set[tuple[str, str, Kind]] = set()
    for family, form, kind, name in cases:
        source, ours = known(family, SOURCE, kind, name), known(family, form, kind, name)
        row = counts.setdefault((family, form, kind), Counter())
        if source is None or ours is None:
            partial.add((family, form, kind))
            continue
        row["source_passed"] += source.status == "passed"
        overridden = source.status == "passed" and name in OVERRIDES
        row["overridden" if overridden else ours.status] += 1
        row["missing"] += source.status == "passed" and not overridden and ours.status != "passed"
        if source.status == "skipped" and (family, form) == (FAMILIES[0], next(iter(FORMS))):
            skips[source.reason] += 1
    if partial == counts.keys():
        return
    versions = {"transformers": VERSION, "torch": torch.__version__.partition("+")[0]}
    earlier = json.loads(RESULTS.read_text(encoding="utf-8"))
    same = {name: earlier[name] for name in versions} == versions
    rows = {(row["family"], row["form"], row["kind"]): row for row in earlier["rows"] if same}
    for (family, form, kind), row in counts.items():
        if (family, form, kind) not in partial:
            found = {name: row[name] for name in COUNTED}
            rows[family, form, kind] = {"family": family, "form": form, "kind": kind, **found}
    if same and (FAMILIES[0], next(iter(FORMS)), KINDS[0]) in partial:
        skipped = earlier["source_skips"]
    else:
        skipped = dict(sorted(skips.items(), key=lambda item: (-item[1], item[0])))
    write(
        {
            **versions,
            "rows": [rows[key] for key in counts if key in rows],
            "overrides": {name: override.reason for name, override in OVERRIDES.items()},
            "source_skips": skipped,
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
        "Each row counts the tests for one family and form, first for the base model and then for the language model:",
        "",
        "- *source*: the tests that pass for the source class,",
        "- *ours*: the tests that pass for our class,",
        "- *overridden*: the tests that a test of ours stands for,",
        "- *missing*: the tests that pass for the source class and neither pass for ours nor are overridden. There",
        "  must be none.",
        "",
        "All other tests skip themselves, for the reasons at the end of this page.",
        "",
        f"| family | form | {' | '.join(heading for kind in HEADINGS for heading in (kind, *HEADINGS[kind]))} |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    by_case = {(row["family"], row["form"], row["kind"]): row for row in results["rows"]}
    for family, form in dict.fromkeys((family, form) for family, form, _ in by_case):
        cells = [
            str(by_case[family, form, kind][name])
            for kind in KINDS
            for name in ("source_passed", "passed", "overridden", "missing")
        ]
        lines.append(f"| {family} | {form} | {' | '.join(cells)} |")
    lines += ["", "The forms of the attention are:", ""]
    lines += [f"- `{form}`: {text}" for form, text in DESCRIPTIONS.items()]
    lines += ["", MATRIX]
    lines += [f"- {mode}" for mode in MODES]
    lines += ["", "## Overridden", ""]
    lines += ["These tests of Transformers cannot pass for our class, so a test of ours stands for each of them:", ""]
    lines += [f"- `{name}`: {reason}" for name, reason in results["overrides"].items()]
    lines += ["", "## Why tests skip themselves for the source class", ""]
    lines += [
        f"The table counts the tests that skip themselves for the {FAMILIES[0]} classes of Transformers, by the reason",
        "that they give. Most reasons are hardware, or parts of models that these classes do not have.",
        "",
        "| reason | tests |",
        "|---|---|",
    ]
    lines += [
        f"| {' '.join(reason.split()).replace('|', '/')} | {n} |" for reason, n in results["source_skips"].items()
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(json.loads(RESULTS.read_text(encoding="utf-8"))), encoding="utf-8")
