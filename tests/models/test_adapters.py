"""Adapters of PEFT on converted models: names that name nothing there are said."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model

from optimum_mla.recovery import mla_lora_config
from tests.nn.test_attention import FORMS, build

pytestmark = pytest.mark.compat

LATENT = {
    "shared rotary key": "kv_a_proj_with_mqa, kv_b_proj",
    "rotary key rebuilt": "kv_a_proj_with_mqa, kv_b_proj, k_rope_proj",
    "full rope": "k_a_proj, v_a_proj, k_b_proj, v_b_proj",
    "hybrid": "kv_a_proj_with_mqa, kv_b_proj",
}


def said(model: Any, config: LoraConfig) -> list[str]:
    """What is said when PEFT adapts a model."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_peft_model(model, config)
    return [str(warning.message) for warning in caught if "target_modules" in str(warning.message)]


@pytest.mark.parametrize("form", LATENT)
def test_the_sources_names_are_said_to_name_nothing(form: str) -> None:
    (line,) = said(build("Llama", form), LoraConfig(target_modules=["q_proj", "k_proj", "v_proj"]))
    assert line.startswith("target_modules: k_proj, v_proj of k_proj, q_proj, v_proj name nothing")
    assert f"The layers of the latent are {LATENT[form]}; mla_lora_config(model), from optimum_mla.recovery," in line


@pytest.mark.parametrize("form", FORMS)
def test_names_that_the_model_has_are_taken_without_a_word(form: str) -> None:
    assert said(build("Llama", form), mla_lora_config(build("Llama", form), rank=2)) == []
    for targets in (["o_proj"], ["up_proj", "down_proj"], "all-linear", r".*self_attn\.(o_proj|k_proj)"):
        assert said(build("Llama", form), LoraConfig(target_modules=targets)) == []
    # A whole path into the layer that is not converted is meant.
    if form == "hybrid":
        targets = ["layers.1.self_attn.k_proj", "o_proj"]
        assert said(build("Llama", form), LoraConfig(target_modules=targets)) == []


def test_adapters_that_are_put_into_the_model_itself_are_checked_too() -> None:
    config = LoraConfig(target_modules=["q_proj", "v_proj"])
    with pytest.warns(UserWarning, match=r"target_modules: v_proj of q_proj, v_proj name nothing"):
        inject_adapter_in_model(config, build("Qwen3", "shared rotary key"))


def test_an_adapter_of_the_source_is_not_taken_for_one_of_the_converted_model(tmp_path: Any) -> None:
    config = LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    with pytest.warns(UserWarning, match="v_proj"):
        adapted = get_peft_model(build("Llama", "full rope"), config)
    adapted.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"v_proj of q_proj, v_proj name nothing"):
        loaded = PeftModel.from_pretrained(build("Llama", "full rope"), tmp_path)
    with torch.no_grad():
        assert loaded(torch.ones(1, 4, dtype=torch.long)).logits.isfinite().all()
    plain = loaded.merge_and_unload()
    assert not hasattr(plain, "peft_config")
