"""Options that a method does not have are refused with a line that names those that it has."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from optimum_mla.core.errors import InvalidValueError, OptionError
from optimum_mla.methods.mha2mla import MHA2MLA
from optimum_mla.pipeline import TextOptions
from optimum_mla.pipeline.conversion_options import build_transformation, default_size, option_names
from optimum_mla.pipeline.conversion_texts import calibrated_texts
from tests.cases import source_model


def test_an_option_of_another_method_is_refused_with_the_options_of_this_one() -> None:
    with pytest.raises(OptionError) as caught:
        build_transformation("mha2mla", {"positional": "full"}, None)
    line = str(caught.value)
    assert line.startswith("mha2mla has no --positional option.")
    assert line.endswith(f"are: {', '.join(option_names(MHA2MLA))}.")


def test_a_misspelt_option_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(OptionError, match=r"no --kv-cache-ration option\. Did you mean kv_cache_ratio\?"):
        build_transformation("gqa2mla", {"kv_cache_ration": 0.5}, None)


def test_the_options_are_those_of_the_class_and_of_its_bases() -> None:
    names = option_names(MHA2MLA)
    assert {"d_kv", "rope_selection", "kv_cache_ratio", "layers", "heal"} <= set(names)
    assert not {"self", "options", "calibration", "positional", "q_lora_rank"} & set(names)


def test_a_class_that_passes_nothing_on_has_its_own_options_alone() -> None:
    class Own(MHA2MLA):
        def __init__(self, share: float = 0.5, *, calibration: Any = None) -> None:
            super().__init__(kv_cache_ratio=share, calibration=calibration)

    assert option_names(Own) == ["share"]


@pytest.mark.parametrize("method", ["gqa2mla", "mha2mla", "x-ecomla"])
def test_options_reach_the_method(method: str) -> None:
    made = build_transformation(method, {"kv_cache_ratio": 0.25, "layers": "0", "heal": False}, None)
    assert made.options["kv_cache_ratio"] == 0.25
    with pytest.raises(InvalidValueError, match="kv_cache_ratio"):
        build_transformation(method, {"kv_cache_ratio": 2.0}, None)


def test_the_default_size_is_a_budget_of_bytes_where_latents_can_be_coded() -> None:
    def size(family: str = "llama", method: str = "gqa2mla", exported: bool = False, **given: Any) -> dict[str, float]:
        texts = TextOptions(uncalibrated=given.pop("uncalibrated", False))
        return default_size(source_model(family).config, method, given, texts, exported)

    assert size() == size("qwen3", layers="0-1") == {"kv_cache_budget": 0.25}
    plain = {"kv_cache_ratio": 0.5}
    assert size("mistral with a window") == size(method="mha2mla") == size(exported=True) == plain
    assert size(uncalibrated=True) == size(rope_cache="cached") == size(factorization="joint") == plain


@pytest.mark.parametrize("instead", [{"statistics": "folder"}, {"uncalibrated": True}])
@pytest.mark.parametrize("option", ["calibration_samples", "calibration_length", "calibration_repeats"])
def test_options_about_windows_are_refused_where_there_are_none(option: str, instead: dict[str, Any]) -> None:
    texts = TextOptions(**instead)
    assert calibrated_texts(texts, "gqa2mla", {}) is texts
    (name,) = instead
    with pytest.raises(OptionError, match=f"^--{option.replace('_', '-')} and --{name} exclude each other"):
        calibrated_texts(replace(texts, **{option: 7}), "gqa2mla", {})
