"""What the source holds, the result holds, or a line names it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from optimum_mla import GQA2MLA
from optimum_mla.export.deepseek import export_deepseek
from optimum_mla.pipeline.checkpoint import Checkpoint
from tests.cases import source_model, token_ids

IDS = token_ids(2, 12)


def test_a_head_of_its_own_stays_whatever_the_config_says(tmp_path: Path) -> None:
    model = source_model("llama", tie_word_embeddings=True)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    with torch.no_grad():
        expected = model(IDS).logits
        GQA2MLA()(model)
        assert not model.config.tie_word_embeddings
        assert (model(IDS).logits - expected).abs().max() <= 1e-4
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert (loaded(IDS).logits - expected).abs().max() <= 1e-4


def test_tied_weights_stay_tied() -> None:
    model = GQA2MLA(kv_cache_ratio=0.5)(source_model("llama", tie_word_embeddings=True))
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_head_that_merged_adapters_bring_is_saved(tmp_path: Path) -> None:
    model = GQA2MLA(kv_cache_ratio=0.5)(source_model("llama", tie_word_embeddings=True))
    adapters = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    trained = get_peft_model(model, adapters)
    with torch.no_grad():
        trained.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
        merged = trained.merge_and_unload()
        expected = merged(IDS).logits
        merged.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert not loaded.config.tie_word_embeddings
        assert torch.equal(loaded.model.embed_tokens.weight * 1.5, loaded.lm_head.weight)
        assert (loaded(IDS).logits - expected).abs().max() <= 1e-4


def test_the_export_has_the_head_of_the_model() -> None:
    from optimum_mla import XEcoMLA

    model = source_model("llama", tie_word_embeddings=True)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    XEcoMLA(kv_cache_ratio=0.5, rope_selection="last")(model)
    model.config.tie_word_embeddings = True  # as somebody else may have set it
    with torch.no_grad():
        exported = export_deepseek(model)
        assert (exported(IDS).logits - model(IDS).logits).abs().max() <= 1e-3
    assert not exported.config.tie_word_embeddings


def test_tensors_that_the_config_does_not_declare_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source_model("llama").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.ones(64)
    weights["model.layers.7.mlp.up_proj.weight"] = torch.ones(80, 64)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING):
        Checkpoint(str(tmp_path)).load("auto", "cpu")
    (line,) = [record.getMessage() for record in caplog.records if "does not declare" in record.getMessage()]
    assert "2 tensors" in line
    assert "model.layers.0.self_attn.q_proj.bias, model.layers.7.mlp.up_proj.weight" in line
