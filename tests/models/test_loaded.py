"""Models that were loaded before their conversion, where Transformers renames and joins weights, as users have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from optimum_mla import GQA2MLA
from optimum_mla.pipeline.checkpoint import Checkpoint
from optimum_mla.pipeline.weight_headers import headers
from tests.cases import EXPERTS, source_model, token_ids
from tests.models.test_wrappers import MODELS, with_image, wrapper

pytestmark = pytest.mark.compat

RENAMED_WRAPPERS = ("gemma3", "internvl", "llava", "mistral3")
"""Wrappers whose checkpoints hold a whole language model with its head, and models hold the head beside the rest."""
NAMES_ON_DISK = {
    "gpt_neox": "embed_out.weight",
    "granitemoe": "model.layers.0.block_sparse_moe.input_linear.weight",
    "mixtral": "model.layers.0.block_sparse_moe.experts.0.w1.weight",
    "qwen2_moe": "model.layers.0.mlp.experts.0.gate_proj.weight",
    "qwen3_moe": "model.layers.0.mlp.experts.0.gate_proj.weight",
}
"""Families whose checkpoints name or shape weights otherwise than their models, and one of these names."""
IDS = {"input_ids": token_ids(2, 12)}
LORA: dict[str, Any] = {"target_modules": r"(?!.*vision).*\.q_proj", "init_lora_weights": False}


def check_alike(model: Any, inputs: dict[str, Tensor], expected: Tensor, off: float = 1e-5) -> None:
    """Logits may differ by rounding, as kernels sum in another order where memory is not aligned alike."""
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=off, atol=off)


def loaded(kind: Any, folder: Path) -> PreTrainedModel:
    """The model of a folder, which must hold all of its weights and nothing else."""
    model, notes = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(notes[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), notes
    return model.eval()  # type: ignore[no-any-return]


@torch.no_grad()
def check_round_trips(kind: Any, model: PreTrainedModel, inputs: dict[str, Tensor], folder: Path) -> PreTrainedModel:
    """Save, load, save in shards, load again; and read the source's names too. Return the model that was loaded."""
    expected = model(**inputs).logits
    model.save_pretrained(folder / "first")
    first = loaded(kind, folder / "first")
    check_alike(first, inputs, expected)
    assert headers(Checkpoint(str(folder / "first"))).keys() <= model.state_dict().keys()
    first.save_pretrained(folder / "second", max_shard_size="50KB")
    assert (folder / "second" / "model.safetensors.index.json").is_file()
    check_alike(loaded(kind, folder / "second"), inputs, expected)
    model.save_pretrained(folder / "original", save_original_format=True)
    check_alike(loaded(kind, folder / "original"), inputs, expected)
    return first


@torch.no_grad()
def check_adapters(kind: Any, model: PreTrainedModel, inputs: dict[str, Tensor], folder: Path) -> None:
    """Train adapters and a head of its own, as it were; save and load them alone, and merged into the model."""
    model.save_pretrained(folder / "base")
    adapted: Any = get_peft_model(model, LoraConfig(**LORA, modules_to_save=["lm_head"]))
    head = next(part for name, part in adapted.named_modules() if name.endswith("lm_head")).modules_to_save["default"]
    head.weight.mul_(1.5)
    adapted.eval()
    expected = adapted(**inputs).logits
    adapted.save_pretrained(folder / "adapters")
    again = PeftModel.from_pretrained(loaded(kind, folder / "base"), folder / "adapters").eval()
    check_alike(again, inputs, expected)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(folder / "merged")
    whole = loaded(kind, folder / "merged")
    check_alike(whole, inputs, merged(**inputs).logits)
    check_alike(whole, inputs, expected, 1e-3)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_wrapper_is_saved_and_loaded_whole(name: str, tied: bool, tmp_path: Path) -> None:
    kind, inputs = AutoModelForImageTextToText, with_image(name)
    wrapper(name, tie_word_embeddings=tied).save_pretrained(tmp_path / "source")
    written = headers(Checkpoint(str(tmp_path / "source")))
    old = "language_model.model.layers.0.self_attn.q_proj.weight" in written
    assert old == (name in RENAMED_WRAPPERS)
    assert ("language_model.lm_head.weight" in written) == (old and not tied)
    model = loaded(kind, tmp_path / "source")
    with torch.no_grad():
        before = model(**inputs).logits
        GQA2MLA(kv_cache_ratio=1.0)(model)
        check_alike(model, inputs, before, 1e-4)
    first = check_round_trips(kind, model, inputs, tmp_path)
    assert (first.get_output_embeddings().weight is first.get_input_embeddings().weight) == tied
    check_adapters(kind, first, inputs, tmp_path)


def test_a_loaded_wrapper_around_experts_is_saved_and_loaded_whole(tmp_path: Path) -> None:
    kind, inputs = AutoModelForImageTextToText, with_image("internvl")
    wrapper("internvl", model_type="qwen3_moe", **EXPERTS).save_pretrained(tmp_path / "source")
    assert "language_model.model.layers.0.mlp.experts.0.gate_proj.weight" in headers(
        Checkpoint(str(tmp_path / "source"))
    )
    model = GQA2MLA(kv_cache_ratio=1.0)(loaded(kind, tmp_path / "source"))
    check_adapters(kind, check_round_trips(kind, model, inputs, tmp_path), inputs, tmp_path)


@pytest.mark.parametrize("family", NAMES_ON_DISK)
def test_a_loaded_model_is_saved_and_loaded_whole(family: str, tmp_path: Path) -> None:
    kind = AutoModelForCausalLM
    source_model(family).save_pretrained(tmp_path / "source")
    written = headers(Checkpoint(str(tmp_path / "source")))
    assert NAMES_ON_DISK[family] in written
    model = loaded(kind, tmp_path / "source")
    with torch.no_grad():
        before = model(**IDS).logits
        GQA2MLA(kv_cache_ratio=1.0)(model)
        check_alike(model, IDS, before, 1e-4)
    first = check_round_trips(kind, model, IDS, tmp_path)
    check_adapters(kind, first, IDS, tmp_path)
