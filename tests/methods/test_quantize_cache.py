"""`QuantizeLatentCache`: what it sets, composes with and refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from optimum.fx.optimization import Transformation
from transformers import AutoModelForCausalLM

from optimum_mla import GQA2MLA, MHA2MLA, LatentCache, QuantizeLatentCache, XEcoMLA, compose
from optimum_mla.core.errors import InvalidValueError, MissingDependencyError, UnsupportedModelError
from optimum_mla.measure.memory import live_cache_bytes
from tests.cases import source_model, token_ids

SETTINGS: dict[str, Any] = {"bits": 4, "backend": "quanto", "group_size": 16, "residual_length": 4, "rope_bits": 8}


@pytest.mark.compat
def test_composes_after_conversions_and_is_saved(tmp_path: Path) -> None:
    parts = GQA2MLA(kv_cache_ratio=0.5, layers="0"), XEcoMLA(kv_lora_rank=20, layers="2")
    composed = compose(*parts, QuantizeLatentCache(**SETTINGS))
    assert isinstance(QuantizeLatentCache(), Transformation)
    assert not composed.preserves_computation
    model = composed(source_model("llama"))
    assert model.config.latent_cache == SETTINGS
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    caches = [
        m.generate(token_ids(1, 20), max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        for m in (model, loaded)
    ]
    assert torch.equal(caches[0].sequences, caches[1].sequences)
    for generated in caches:
        assert isinstance(generated.past_key_values, LatentCache)
        first = generated.past_key_values.layers[0]
        assert (first.settings.bits, first.settings.backend, first.settings.residual_length) == (4, "quanto", 4)
    weights = [live_cache_bytes(generated.past_key_values) for generated in caches]
    plain = model.generate(
        token_ids(1, 20), max_new_tokens=4, cache_implementation="dynamic", return_dict_in_generate=True
    )
    assert weights[0] == weights[1] < live_cache_bytes(plain.past_key_values)


def test_a_later_conversion_keeps_the_settings() -> None:
    quantized = compose(GQA2MLA(layers="0"), QuantizeLatentCache(bits=8))(source_model("llama"))
    both = MHA2MLA(kv_cache_ratio=0.5, layers="1-2")(quantized)
    assert both.config.latent_cache["bits"] == 8


def test_copy_leaves_the_model_as_it_is() -> None:
    model = GQA2MLA()(source_model("llama"))
    other = QuantizeLatentCache(bits=2)(model, copy=True)
    assert (model.config.latent_cache, other.config.latent_cache["bits"]) == (None, 2)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("bits", 5, "8, 4, 3, 2"),
        ("bits", 0, "8, 4, 3, 2"),
        ("backend", "hqqq", "Did you mean hqq"),
        ("group_size", 7, "multiples of 4 from 8"),
        ("residual_length", -1, "integers from 0"),
        ("rope_bits", 4, "8, 16"),
    ],
)
def test_values_that_a_field_cannot_have(field: str, value: Any, message: str) -> None:
    with pytest.raises(InvalidValueError, match=message) as error:
        QuantizeLatentCache(**{field: value})
    assert error.value.field == field
    assert error.value.received == value


def test_quanto_has_no_three_bits() -> None:
    with pytest.raises(InvalidValueError, match="8, 4, 2 with the backend quanto"):
        QuantizeLatentCache(bits=3, backend="quanto")


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.delitem(sys.modules, "optimum_mla.cache.hqq", raising=False)
    monkeypatch.setitem(sys.modules, "hqq.core.quantize", None)
    with pytest.raises(MissingDependencyError, match=r"optimum-mla\[hqq\]"):
        QuantizeLatentCache(backend="hqq")


def test_models_without_a_latent_cache_are_refused_before_any_work() -> None:
    with pytest.raises(UnsupportedModelError, match="not converted"):
        QuantizeLatentCache()(source_model("llama"))
    windowed = GQA2MLA()(source_model("mistral with a window"))
    with pytest.raises(UnsupportedModelError, match="sliding window"):
        QuantizeLatentCache()(windowed)
    assert windowed.config.latent_cache is None


def test_unknown_settings_in_a_config_are_named() -> None:
    model = GQA2MLA()(source_model("llama"))
    model.config.latent_cache = {"bitz": 4}
    with pytest.raises(InvalidValueError, match="bitz"):
        model.make_cache()
