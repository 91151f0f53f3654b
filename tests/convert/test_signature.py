"""What an editor shows of a method: every option, also those of its base classes."""

from __future__ import annotations

import inspect
import warnings
from typing import Any, get_type_hints

import pytest

from optimum_mla import GQA2MLA, MHA2MLA, MLATransformation, XEcoMLA
from optimum_mla.convert.signature import MethodOptions, MLAOptions
from optimum_mla.core.errors import UncalibratedWarning
from tests.cases import source_model, token_ids


@pytest.mark.parametrize("method", [GQA2MLA, MHA2MLA, XEcoMLA])
def test_the_signature_has_every_option_and_calls_as_it_says(method: Any) -> None:
    parameters = inspect.signature(method).parameters
    assert set(MLAOptions.__annotations__) <= set(parameters)
    assert all(one.kind is not inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    method(**{name: one.default for name, one in parameters.items() if one.default is not inspect.Parameter.empty})


def test_the_typed_options_are_those_of_the_base_class() -> None:
    assert get_type_hints(MLAOptions) == get_type_hints(MethodOptions)
    assert set(MLAOptions.__annotations__) == set(inspect.signature(MLATransformation).parameters)


def test_only_a_lossy_conversion_without_calibration_warns() -> None:
    with pytest.warns(UncalibratedWarning, match="gqa2mla without calibration data below full rank"):
        GQA2MLA(kv_cache_ratio=0.5)(source_model("llama"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UncalibratedWarning)
        GQA2MLA()(source_model("llama"))
        GQA2MLA(kv_cache_ratio=0.5, calibration=token_ids(4, 24))(source_model("llama"))
