"""Quantized weights: what they cost, how far they are off, and that they save and load as they are."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from optimum_mla import models
from optimum_mla.core.errors import InvalidValueError, MissingDependencyError, UnsupportedModelError
from optimum_mla.nn.projections import UP_PROJECTIONS
from optimum_mla.weights import WEIGHT_CHOICES, bitsandbytes_config, check_weights, weight_bytes
from tests.cases import SIZES, token_ids
from tests.nn.test_attention import FORMS, latent_attentions

QUANTIZED = [choice for choice in WEIGHT_CHOICES if choice != "none"]
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "num_up_heads": 2}
QUERY_LATENT = "norms and query latent"
FRESH = """
import json, sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
import optimum_mla
torch.set_num_threads(1)
ids, found = torch.tensor(json.loads(sys.argv[1])), {}
for folder in sys.argv[3:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        found[folder] = model(ids).logits
        found[folder + "/tokens"] = model.generate(ids, max_new_tokens=6, do_sample=False)
save_file(found, sys.argv[2])
"""


def build(
    tmp_path: Path, form: str = QUERY_LATENT, dtype: torch.dtype = torch.float32, family: str = "Qwen2", **fields: Any
) -> PreTrainedModel:
    """A converted model with random weights and biases, its dtype that of a loaded checkpoint."""
    sizes = {**SIZES, **FORMS[form], **WIDE, **fields}
    if form == QUERY_LATENT:
        sizes["q_lora_rank"] = 64
    if FORMS[form]["attention_form"] == "full":
        sizes |= {"num_up_heads": 8, "k_lora_rank": 32, "v_lora_rank": 32}
    else:  # The rows of the down-projection are a multiple of 32, those of its rotary key among them.
        rotary = sizes.get("num_rope_heads", 1) * sizes["qk_rope_head_dim"]
        sizes["kv_lora_rank"] = 32 if sizes.get("rope_cache") == "rebuilt" else 64 - rotary
        if form == "hybrid":
            sizes["per_layer_config"] = {1: {"attention_form": "source"}, 2: {"kv_lora_rank": 32 - rotary}}
    model = getattr(models, f"{family}MLAForCausalLM")(getattr(models, f"{family}MLAConfig")(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "source")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=dtype)


def quantized(model: PreTrainedModel, choice: str, folder: Path) -> PreTrainedModel:
    """The model with quantized weights, by Transformers."""
    model.save_pretrained(folder / "plain")
    config = bitsandbytes_config(model.config, choice)
    return AutoModelForCausalLM.from_pretrained(folder / "plain", quantization_config=config)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(token_ids(2, 12)).logits.float()


def relative(error: Tensor, reference: Tensor) -> float:
    return (error.norm() / reference.norm()).item()


def bytes_on_disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The layers that should be quantized."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and not name.endswith((*UP_PROJECTIONS, "lm_head"))
    }


@pytest.mark.compat
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("choice", QUANTIZED)
def test_quantized_weights_are_close_small_and_survive_saving(choice: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = build(tmp_path, dtype=dtype)
    before, bytes_before, expected = logits(model), weight_bytes(model), linears(model)
    kept = {name: tensor for name, tensor in model.state_dict().items() if name.removesuffix(".weight") not in expected}
    weights = {name: linear.weight.detach().clone() for name, linear in expected.items()}
    assert bytes_before == sum(
        tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()]
    )

    model = quantized(model, choice, tmp_path)
    four = choice.endswith("4")
    for name, weight in weights.items():
        module, inputs = model.get_submodule(name), torch.randn(40, weight.shape[1]).to(dtype)
        bias = 0 if module.bias is None else module.bias
        error = relative((module(inputs) - bias).float() - inputs.float() @ weight.float().T, inputs @ weight.T)
        assert (0.05 if four else 0.002) < error < (0.13 if four else 0.02), name
    assert not linears(model)
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in kept.items())
    assert all(attention._absorbable() for attention in latent_attentions(model))
    after = logits(model)
    assert (1e-2 if four else 1e-3) < relative(after - before, before) < (0.6 if four else 0.1)

    # Codes; scales in float32, one a group or a row; at most 320 bytes of tables and flags a layer.
    numbers, rows = sum(w.numel() for w in weights.values()), sum(w.shape[0] for w in weights.values())
    size = dtype.itemsize
    parameters = {"bnb-nf4": numbers // 64 * 4, "bnb-int8": rows * 4}[choice]
    stored = weight_bytes(model) - (bytes_before - numbers * size)
    assert 0 <= stored - (numbers // (2 if four else 1) + parameters) <= 320 * len(weights)

    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        model.save_pretrained(folder)
        assert abs(bytes_on_disk(folder) - weight_bytes(model)) < 40_000
        loaded, notes = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not notes["missing_keys"]
        assert not notes["unexpected_keys"]
        assert loaded.dtype == dtype
        assert torch.equal(logits(loaded), after)
        assert abs(weight_bytes(loaded) - weight_bytes(model)) < 64
        assert all(attention._absorbable() for attention in latent_attentions(loaded))
        model = loaded
    assert bytes_on_disk(folders[1]) == bytes_on_disk(folders[0])


@pytest.mark.compat
def test_fresh_process_loads_and_generates(tmp_path: Path) -> None:
    folders, expected = [], {}
    for choice in QUANTIZED:
        model = quantized(build(tmp_path, family="Qwen3", dtype=torch.bfloat16), choice, tmp_path)
        folder = str(tmp_path / choice)
        model.save_pretrained(folder)
        folders.append(folder)
        with torch.no_grad():
            expected[folder] = model(token_ids(2, 12)).logits
            expected[f"{folder}/tokens"] = model.generate(token_ids(2, 12), max_new_tokens=6, do_sample=False)
    out = tmp_path / "found.safetensors"
    command = [sys.executable, "-c", FRESH, json.dumps(token_ids(2, 12).tolist()), str(out), *folders]
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    found = load_file(out)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("choice", QUANTIZED)
@pytest.mark.parametrize("form", ["full rope", "hybrid", "rotary key rebuilt"])
def test_every_form_saves_and_loads(choice: str, form: str, tmp_path: Path) -> None:
    model = build(tmp_path, form, family="Llama", attention_bias=True)
    names = list(linears(model))
    assert any("k_proj" in name for name in names) == (form == "hybrid")
    model = quantized(model, choice, tmp_path)
    assert not linears(model)
    model.save_pretrained(tmp_path / "quantized")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    assert torch.equal(logits(loaded), logits(model))
    assert {type(loaded.get_submodule(name)) for name in names} == {type(model.get_submodule(names[0]))}


@pytest.mark.parametrize("choice", QUANTIZED)
def test_layers_of_unfit_sizes_stay(choice: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = build(tmp_path, dtype=torch.bfloat16, intermediate_size=72)
    unfit = [f"model.layers.{layer}.mlp.{name}_proj" for layer in range(3) for name in ("gate", "up", "down")]
    with caplog.at_level(logging.WARNING, "optimum_mla"):
        model = quantized(model, choice, tmp_path)
    assert list(linears(model)) == ([] if choice == "bnb-int8" else unfit)
    assert caplog.text.count(".mlp.") == len(linears(model))
    model.save_pretrained(tmp_path / "quantized")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    assert linears(loaded).keys() == linears(model).keys()
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.compat
@pytest.mark.parametrize("choice", QUANTIZED)
def test_adapters_train_on_quantized_weights(choice: str, tmp_path: Path) -> None:
    model = quantized(build(tmp_path), choice, tmp_path)
    before = logits(model)
    adapted = get_peft_model(model, LoraConfig(target_modules=["o_proj", "up_proj"], r=2))
    assert torch.equal(logits(adapted), before)
    adapted.train()(token_ids(2, 12), labels=token_ids(2, 12)).loss.backward()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2 * 3
    assert all(parameter.grad is not None for parameter in trained)
    assert any(parameter.grad.abs().max() > 0 for parameter in trained)


def test_weight_bytes_counts_tied_weights_once(tmp_path: Path) -> None:
    tied = build(tmp_path, tie_word_embeddings=True)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert weight_bytes(tied) == sum(t.numel() * t.element_size() for t in [*tied.parameters(), *tied.buffers()])


def test_errors_name_the_way_out(tmp_path: Path) -> None:
    model = build(tmp_path)
    with pytest.raises(InvalidValueError, match="Did you mean bnb-nf4") as caught:
        bitsandbytes_config(model.config, "nf4")
    assert all(choice in str(caught.value) for choice in WEIGHT_CHOICES)
    with pytest.raises(InvalidValueError, match="allowed: bnb-nf4 or bnb-int8"):
        bitsandbytes_config(model.config, "none")
    with pytest.raises(UnsupportedModelError, match="mla-convert"):
        bitsandbytes_config(LlamaConfig(**SIZES), "bnb-nf4")
    saved = quantized(model, "bnb-int8", tmp_path)
    saved.save_pretrained(tmp_path / "quantized")
    for config in (saved.config, AutoConfig.from_pretrained(tmp_path / "quantized")):
        with pytest.raises(UnsupportedModelError, match=r"quantized already \(bitsandbytes\)"):
            bitsandbytes_config(config, "bnb-nf4")
    sizes = {"hidden_size": 72, "intermediate_size": 72, "num_attention_heads": 2}
    unfit = build(tmp_path, "shared rotary key", **sizes)
    with pytest.raises(UnsupportedModelError, match="in_features divisible by 64 and out_features divisible by 32"):
        bitsandbytes_config(unfit.config, "bnb-nf4")


@pytest.mark.parametrize(
    ("choice", "instead"),
    [("hqq-int4", "bnb-nf4"), ("hqq-int8", "bnb-int8"), ("quanto-int4", "bnb-nf4"), ("quanto-int8", "bnb-int8")],
)
def test_choices_that_are_gone_say_what_to_take(choice: str, instead: str) -> None:
    with pytest.raises(InvalidValueError, match=f"got '{choice}', allowed: none, .* Take {instead}:"):
        check_weights(choice)


@pytest.mark.parametrize("method", ["mla_hqq", "mla_quanto"])
def test_checkpoints_of_methods_that_are_gone_are_refused(method: str, tmp_path: Path) -> None:
    """Transformers skips a method that it does not know, and would fill the weights with random numbers."""
    build(tmp_path)
    path = tmp_path / "source" / "config.json"
    quantization = {"quant_method": method, "bits": 4, "modules_to_not_convert": ["lm_head"]}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": quantization}))
    for load in (AutoModelForCausalLM.from_pretrained, models.Qwen2MLAForCausalLM.from_pretrained):
        with pytest.raises(UnsupportedModelError, match="Run mla-quantize --weights bnb-nf4 or bnb-int8 on the unq"):
            load(tmp_path / "source")


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(tmp_path)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingDependencyError, match=r"optimum-mla\[bitsandbytes\]"):
        bitsandbytes_config(model.config, "bnb-nf4")


def test_importing_the_models_imports_no_library() -> None:
    code = (
        "import optimum_mla, optimum_mla.weights, sys;assert not {'optimum.quanto', 'bitsandbytes'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
