"""What works for the source class works for ours, mode by mode: generation, cache classes, exporters."""

from __future__ import annotations

from functools import cache

import pytest
from torch import Tensor

from optimum_mla import GQA2MLA
from tests.transformers_suite.families import FAMILIES, FORMS, SOURCE
from tests.transformers_suite.modes import MODES, build

Case = tuple[str, str, str]
EXPORTERS = (
    "torch.export",
    "torch.export with a static cache",
    "Dynamo exporter",
    "Dynamo exporter, a step with the default cache",
)
"""The slowest modes. Of the families, one with and one without norms on its keys run them in every form."""
CASES: list[Case] = [
    (family, form, mode)
    for family in FAMILIES
    for form in FORMS
    for mode in MODES
    if mode not in EXPORTERS or family in ("Llama", "Qwen3")
]
QUICK = [case for case in CASES if case[:2] == ("Llama", "shared") and case[2] not in EXPORTERS]


def failure(mode: str, given: Tensor, expected: Tensor) -> str | None:
    """Return what is wrong with the result of a mode, or None."""
    tolerance = MODES[mode].tolerance
    if given.shape != expected.shape:
        return f"{mode}: shape {list(given.shape)}, expected {list(expected.shape)}"
    difference = (given.double() - expected.double()).abs().max().item()
    return f"{mode}: off by {difference}, allowed {tolerance}" if not difference <= tolerance else None


@cache
def source_result(family: str, mode: str) -> Tensor | type[Exception]:
    """Return what a mode gives for the source class, or what it raises: some refuse sliding windows, for example."""
    try:
        return MODES[mode].run(build(family, SOURCE))
    except Exception as error:
        return type(error)


@cache
def source_failure(family: str, mode: str) -> str | None:
    """Return what is wrong with a mode for the source class, or None."""
    given = source_result(family, mode)
    if isinstance(given, type):
        return f"{mode}: raises {given.__name__}"
    return failure(mode, given, MODES[mode].expected(build(family, SOURCE)))


def check(family: str, form: str, mode: str) -> None:
    """Raise unless a mode that works for the source class gives what it must for ours.

    A mode that raises for the source class may raise the same for ours, or give what it must.
    """
    refused = source_result(family, mode)
    try:
        given = MODES[mode].run(build(family, form))
    except Exception as error:
        if isinstance(refused, type) and isinstance(error, refused):
            return
        raise
    wrong = failure(mode, given, MODES[mode].expected(build(family, form)))
    if wrong and not isinstance(refused, type) and (of_source := source_failure(family, mode)):
        pytest.skip(f"wrong for the source class too: {of_source}")
    assert wrong is None


@pytest.mark.parametrize("case", QUICK, ids="-".join)
def test_a_selection_of_modes(case: Case) -> None:
    family, form, mode = case
    check(family, form, mode)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_every_mode(case: Case) -> None:
    family, form, mode = case
    check(family, form, mode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [name for name, mode in MODES.items() if mode.exact])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_full_rank_conversion_gives_its_sources_result(family: str, mode: str) -> None:
    expected = source_result(family, mode)
    if isinstance(expected, type) or source_failure(family, mode):
        pytest.skip(f"does not work for the source class: {source_failure(family, mode)}")
    given = MODES[mode].run(GQA2MLA()(build(family, SOURCE)))
    assert failure(mode, given, expected) is None


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_works_for_a_source_class_without_a_window(mode: str) -> None:
    # Otherwise a mode that breaks everywhere would pass.
    assert source_failure("Llama", mode) is None
