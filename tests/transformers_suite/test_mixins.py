"""Every test of Transformers that passes for a source class passes for ours."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.transformers_suite import fetch
from tests.transformers_suite.families import KINDS, RUNS, SOURCE, Kind

if not fetch.fetched():
    pytest.skip(fetch.MISSING, allow_module_level=True)

from tests.transformers_suite.counts import record
from tests.transformers_suite.outcomes import outcome
from tests.transformers_suite.overrides import OVERRIDES
from tests.transformers_suite.tester import is_distributed, names_of

Case = tuple[str, str, Kind, str]
CASES: list[Case] = [(family, form, kind, name) for family, form in RUNS for kind in KINDS for name in names_of(kind)]
SLOWEST = ("test_training_overfit", "test_bc_torch_dtype", "test_can_init_all_missing_weights")


def is_quick(case: Case) -> bool:
    """Return whether a case belongs to the part that runs with every `make test`."""
    family, form, _, name = case
    if family != "Llama" or form not in ("full", "shared") or is_distributed(name) or name in SLOWEST:
        return False
    # 24 of these differ in dtype, padding and kernel only.
    return "eager_matches_sdpa" not in name or "fp32_pad_left" in name


def check(case: Case) -> None:
    """Compare one test on our class and on its source.

    Raises:
        AssertionError: It passes for the source, and neither passes for ours nor is overridden; or it fails for ours
            where the source at least skips it; or its override is not needed.
    """
    family, form, kind, name = case
    source, ours = outcome(family, SOURCE, kind, name), outcome(family, form, kind, name)
    if source.status == "passed" and name in OVERRIDES:
        assert ours.status != "passed", f"{name} passes: its override is not needed"
        OVERRIDES[name].check(family, form, kind)
    elif source.status == "passed":
        assert ours.status == "passed", f"{name}: {ours.status} for ours, passes for the source\n{ours.reason}"
    else:
        assert ours.status != "failed" or source.status == "failed", ours.reason


@pytest.fixture(scope="module", autouse=True)
def _recorded() -> Iterator[None]:
    """Write the counts and their page after a run that was complete."""
    yield
    record(CASES)


@pytest.mark.parametrize("case", filter(is_quick, CASES), ids="-".join)
def test_a_selection_passes_as_for_the_source(case: Case) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "form"), RUNS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_passes_for_the_source_passes_for_ours(family: str, kind: Kind, form: str) -> None:
    # One test for all names: ten thousand of them would take longer to collect than the quick part takes to run.
    wrong = []
    for name in names_of(kind):
        try:
            check((family, form, kind, name))
        except AssertionError as error:
            wrong.append(f"{name}: {error}")
    assert not wrong, f"{len(wrong)} tests\n" + "\n".join(wrong)
