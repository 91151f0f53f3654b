"""Layers, budgets, choices, and the registry of methods."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_mla import GQA2MLA, MHA2MLA, XEcoMLA, available_transforms, register_transform
from optimum_mla.core.errors import InvalidValueError
from optimum_mla.core.layers import parse_layers
from optimum_mla.methods.registry import transform_class
from optimum_mla.plan.budget import RankBudget


@pytest.mark.parametrize(
    ("text", "layers"),
    [("all", range(8)), ("0-3", range(4)), ("1,3, 5", [1, 3, 5]), ("6-7,0", [0, 6, 7]), ([2, 1, 2], [1, 2])],
)
def test_layer_lists(text: str, layers: list[int]) -> None:
    assert parse_layers(text, 8) == tuple(layers)


@pytest.mark.parametrize(
    "text",
    ["", "8", "0-8", "3-1", "0-99999999999999", "99999999999999-99999999999999", "-1", "a", "1,,2", [], [8], [-1]],
)
def test_bad_layer_lists(text: str) -> None:
    with pytest.raises(InvalidValueError, match="0 to 7"):
        parse_layers(text, 8)


@given(layers=st.sets(st.integers(0, 30), min_size=1))
def test_layer_lists_round_trip(layers: set[int]) -> None:
    assert parse_layers(",".join(map(str, layers)), 31) == tuple(sorted(layers))


@given(ratio=st.floats(0.01, 1), numbers=st.integers(8, 4096), overhead=st.integers(0, 64))
def test_a_ratio_is_never_exceeded_and_nearly_used(ratio: float, numbers: int, overhead: int) -> None:
    try:
        rank = RankBudget(kv_cache_ratio=ratio).rank(numbers, overhead, numbers, lambda: torch.empty(0))
    except InvalidValueError:
        assert ratio * numbers < overhead + 1 or ratio * numbers >= overhead + numbers + 1
    else:
        assert ratio * numbers - 1 < rank + overhead <= ratio * numbers + 1e-6


@pytest.mark.parametrize(
    "options",
    [
        {"kv_lora_rank": 0},
        {"kv_cache_ratio": 0.0},
        {"kv_cache_ratio": 1.01},
        {"energy": 0.0},
        {"energy": 2.0},
        {"kv_lora_rank": 8, "energy": 0.5},
    ],
)
def test_bad_budgets(options: dict[str, float]) -> None:
    for method in (GQA2MLA, MHA2MLA, XEcoMLA):
        with pytest.raises(InvalidValueError):
            method(**options)


def test_bad_choices_list_the_good_ones() -> None:
    with pytest.raises(InvalidValueError, match="high, low, uniform, contribution"):
        MHA2MLA(rope_selection="fast")
    with pytest.raises(InvalidValueError, match="joint, split"):
        MHA2MLA(factorization="both")  # type: ignore[arg-type]
    with pytest.raises(InvalidValueError, match="calibration"):
        XEcoMLA(rope_selection="contribution")
    with pytest.raises(InvalidValueError, match="d_kv"):
        MHA2MLA(d_kv=8, kv_cache_ratio=0.5)
    with pytest.raises(InvalidValueError, match="q_lora_rank and q_energy"):
        XEcoMLA(q_lora_rank=8, q_energy=0.5)


@pytest.mark.parametrize("received", ["8", 8.0, True, [8]])
@pytest.mark.parametrize(
    ("method", "field"),
    [(MHA2MLA, "d_kv"), (XEcoMLA, "q_lora_rank"), (GQA2MLA, "qk_rope_head_dim")],
)
def test_counts_are_integers(method: Any, field: str, received: object) -> None:
    with pytest.raises(InvalidValueError, match=rf"^{field}: .*integers from .*Give an integer, not a"):
        method(**{field: received}, calibration=torch.zeros(1, 2, dtype=torch.long))


@pytest.mark.parametrize("received", ["0.5", True, [0.5]])
def test_the_energy_of_queries_is_a_number(received: Any) -> None:
    with pytest.raises(InvalidValueError, match=r"^q_energy: .*above 0, up to 1.*Give a number, not a"):
        XEcoMLA(q_energy=received)


def test_registry_lists_suggests_and_takes_others() -> None:
    assert list(available_transforms())[:3] == ["gqa2mla", "mha2mla", "x-ecomla"]
    assert transform_class("x-ecomla") is XEcoMLA
    with pytest.raises(InvalidValueError, match="Did you mean x-ecomla"):
        transform_class("xecomla")
    register_transform("mine", "optimum_mla.methods.gqa2mla:GQA2MLA")
    assert transform_class("mine") is GQA2MLA


def test_listing_methods_loads_no_torch() -> None:
    script = (
        "import importlib.util, sys\n"
        "spec = importlib.util.find_spec('optimum_mla')\n"
        "import types; package = types.ModuleType('optimum_mla'); package.__path__ = spec.submodule_search_locations\n"
        "sys.modules['optimum_mla'] = package\n"
        "from optimum_mla.methods.registry import available_transforms\n"
        "print(*available_transforms(), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["gqa2mla", "mha2mla", "x-ecomla", "False"]
