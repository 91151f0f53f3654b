"""Which parameters train, name by name, in every form of attention."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_mla.core.errors import InvalidValueError, UnsupportedModelError
from optimum_mla.recovery import kv_parameters, mla_lora_config, prepare
from optimum_mla.recovery.parameters import parameter_counts
from optimum_mla.weights import bitsandbytes_config
from tests.cases import source_model, token_ids
from tests.nn.test_attention import FORMS, build

EXPECTED = {
    "shared rotary key": {"kv_a_proj_with_mqa", "kv_b_proj"},
    "rotary key per head": {"kv_a_proj_with_mqa", "kv_b_proj"},
    "own up-projection per query head": {"kv_a_proj_with_mqa", "kv_b_proj"},
    "norms and query latent": {"kv_a_proj_with_mqa", "kv_b_proj"},
    "rotary key rebuilt": {"kv_a_proj_with_mqa", "kv_b_proj", "k_rope_proj"},
    "full rope": {"k_a_proj", "v_a_proj", "k_b_proj", "v_b_proj"},
    "hybrid": {"kv_a_proj_with_mqa", "kv_b_proj"},
}
every_form = pytest.mark.parametrize("form", FORMS)


def expected_modules(model: PreTrainedModel, form: str, layers: range | None = None) -> set[str]:
    converted = [i for i in (layers or range(model.config.num_hidden_layers)) if not (form == "hybrid" and i == 1)]
    return {f"model.layers.{i}.self_attn.{name}" for i in converted for name in EXPECTED[form]}


def trained(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@every_form
@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_adapters_sit_on_the_latent_projections_and_nowhere_else(form: str, family: str) -> None:
    model = build(family, form)
    assert set(mla_lora_config(model).target_modules) == expected_modules(model, form)
    assert set(mla_lora_config(model, layers="2").target_modules) == expected_modules(model, form, range(2, 3))
    modules = expected_modules(model, form)
    peft = prepare(model, "lora", lora_rank=3)
    assert isinstance(peft, PeftModel)
    names = {name.removeprefix("base_model.model.") for name in trained(peft)}
    assert names == {f"{module}.lora_{side}.default.weight" for module in modules for side in "AB"}
    expected = sum(3 * sum(model.get_submodule(m).base_layer.weight.shape) for m in modules)
    assert parameter_counts(peft)[0] == expected


@every_form
def test_kv_attention_and_full(form: str) -> None:
    model = build("Llama", form)
    modules = expected_modules(model, form)
    latent = {f"{m}.{kind}" for m in modules for kind in dict(model.get_submodule(m).named_parameters())}
    by_identity = {id(parameter) for parameter in kv_parameters(model)}
    assert {name for name, parameter in model.named_parameters() if id(parameter) in by_identity} == latent
    assert prepare(model, "kv") is model
    assert trained(model) == latent
    prepare(model, "kv", layers="0")
    assert trained(model) == {name for name in latent if ".layers.0." in name}
    prepare(model, "attention")
    assert trained(model) == {name for name, _ in model.named_parameters() if ".self_attn." in name}
    prepare(model, "attention", layers="1-2" if form != "hybrid" else "0,1")
    assert all(".self_attn." in name for name in trained(model))
    prepare(model, "full")
    assert trained(model) == {name for name, _ in model.named_parameters()}
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert parameter_counts(model) == (numbers, numbers)


@pytest.mark.compat
def test_a_merged_adapter_is_a_plain_converted_model() -> None:
    model, ids = build("Llama", "rotary key rebuilt"), token_ids()
    adapted = prepare(model, "lora", lora_rank=4)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
        expected = adapted(ids).logits
        plain = adapted.merge_and_unload()
        assert (plain(ids).logits - expected).abs().max() <= 1e-5
    assert type(plain) is type(build("Llama", "rotary key rebuilt"))
    assert plain.model.layers[0].self_attn._absorbable()


@pytest.mark.parametrize("choice", ["bnb-nf4", "bnb-int8"])
def test_packed_weights_count_as_what_they_stand_for(choice: str, tmp_path: Path) -> None:
    model = build("Llama", "shared rotary key")
    before = parameter_counts(model)[1]
    model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=bitsandbytes_config(model.config, choice)
    )
    assert parameter_counts(model)[1] == before
    for train in ("kv", "attention", "full"):
        with pytest.raises(InvalidValueError, match="quantized"):
            prepare(model, train)
    assert parameter_counts(prepare(model, "lora", lora_rank=2))[0] > 0


def test_what_cannot_train_is_named() -> None:
    with pytest.raises(UnsupportedModelError, match="mla-convert"):
        mla_lora_config(source_model("llama"))
    model = build("Llama", "hybrid")
    with pytest.raises(InvalidValueError, match=r"Did you mean lora\?"):
        prepare(model, "lore")
    with pytest.raises(InvalidValueError, match="lora_rank"):
        prepare(model, "lora", lora_rank=0)
    with pytest.raises(InvalidValueError, match="layers"):
        prepare(model, "kv", layers="0-9")
    with pytest.raises(UnsupportedModelError, match="none of 1"):
        prepare(model, "kv", layers="1")
    with pytest.raises(InvalidValueError, match="all with train full"):
        prepare(model, "full", layers="0")
