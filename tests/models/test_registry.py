"""Families, their classes, and what survives saving and loading."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast, pipeline

from optimum_mla import GQA2MLA, MHA2MLA, XEcoMLA, compose, models, supported_model_types
from optimum_mla.core.errors import UnsupportedModelError
from tests.cases import FAMILIES, METHODS, SIZES, source_model, token_ids


def saved_hybrid(folder: Path, family: str = "qwen3", dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Three layers of three kinds, saved."""
    hybrid = compose(GQA2MLA(layers="0"), XEcoMLA(kv_lora_rank=12, layers="2", latent_norm=True))
    model = hybrid(source_model(family, dtype))
    model.save_pretrained(folder)
    return model


def test_supported_families() -> None:
    assert {"llama", "mistral", "qwen2", "qwen3"} <= set(supported_model_types())
    with pytest.raises(UnsupportedModelError, match=r"'gpt2', supported: .*llama, .*qwen3_moe"):
        models.family_of(GPT2Config())


@pytest.mark.compat
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama multi-head, tied", "mistral with a window", "qwen2", "qwen3"])
def test_saving_and_loading_changes_nothing(family: str, method: str, tmp_path: Path) -> None:
    converted = METHODS[method](token_ids())(source_model(family))
    converted.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(converted)
    assert loaded.geometry == converted.geometry
    with torch.no_grad():
        assert torch.allclose(loaded(token_ids()).logits, converted(token_ids()).logits, atol=1e-6)
    again = loaded.config.to_diff_dict()
    loaded.save_pretrained(tmp_path / "again")
    assert AutoConfig.from_pretrained(tmp_path / "again").to_diff_dict() == again


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_come_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    converted = saved_hybrid(tmp_path, dtype=dtype)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == dtype
    for name, tensor in converted.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_shards(tmp_path: Path) -> None:
    converted = GQA2MLA(kv_cache_ratio=0.5)(source_model("llama"))
    converted.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.allclose(loaded(token_ids()).logits, converted(token_ids()).logits, atol=1e-6)


def test_base_model_loads_alone(tmp_path: Path) -> None:
    converted = saved_hybrid(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base).__name__ == "Qwen3MLAModel"
    with torch.no_grad():
        hidden = converted(token_ids(), output_hidden_states=True).hidden_states[-1]
        assert torch.allclose(base(token_ids()).last_hidden_state, hidden, atol=1e-6)


@pytest.mark.compat
@pytest.mark.parametrize(
    ("script", "rc"),
    [
        ("import optimum_mla, transformers as t; m = t.AutoModelForCausalLM.from_pretrained({0!r})", 0),
        ("import transformers as t; m = t.AutoModelForCausalLM.from_pretrained({0!r}, trust_remote_code=True)", 0),
        ("import transformers as t; m = t.AutoModelForCausalLM.from_pretrained({0!r})", 1),
    ],
)
def test_a_fresh_process_loads_it(script: str, rc: int, tmp_path: Path) -> None:
    saved_hybrid(tmp_path / "model")
    code = script.format(str(tmp_path / "model")) + "\nprint(type(m).__name__)"
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == rc, done.stderr
    assert ("Qwen3MLAForCausalLM" in done.stdout) == (rc == 0)


WITHOUT_THE_PACKAGE = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "optimum_mla":
            raise ModuleNotFoundError("No module named 'optimum_mla'", name="optimum_mla")
sys.meta_path.insert(0, Missing())
"""
LOADED = "import transformers as t; m = t.AutoModelForCausalLM.from_pretrained({0!r}, trust_remote_code=True)"


def fresh_process(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules")}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


def test_without_the_package_the_error_says_to_install_and_import_it(tmp_path: Path) -> None:
    saved_hybrid(tmp_path / "model")
    done = fresh_process(WITHOUT_THE_PACKAGE + LOADED.format(str(tmp_path / "model")), tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ImportError: The attention of this model was converted by optimum-mla, which is missing or too old here "
        "(No module named 'optimum_mla'). Run `pip install --upgrade optimum-mla`, and write `import optimum_mla` "
        "before `from_pretrained`."
    )
    # Without trust the words are those of Transformers, which tell the user to look into the folder.
    done = fresh_process(LOADED.format(str(tmp_path / "model")).replace(", trust_remote_code=True", ""), tmp_path)
    assert done.returncode == 1
    assert f"inspect the repository content at {tmp_path / 'model'}" in done.stderr
    assert "`import optimum_mla` stands before `from_pretrained`" in (tmp_path / "model/modeling_mla.py").read_text()


def test_a_model_that_was_loaded_by_its_own_code_is_saved_as_it_was(tmp_path: Path) -> None:
    saved_hybrid(tmp_path / "model")
    again = LOADED.format(str(tmp_path / "model")) + f"\nm.save_pretrained({str(tmp_path / 'again')!r})"
    assert fresh_process(again, tmp_path).returncode == 0
    first, second = ({path.name for path in (tmp_path / name).iterdir()} for name in ("model", "again"))
    assert first == second
    maps = [json.loads((tmp_path / name / "config.json").read_text())["auto_map"] for name in ("model", "again")]
    assert maps[0] == maps[1]
    done = fresh_process(LOADED.format(str(tmp_path / "again")) + "\nprint(type(m).__name__)", tmp_path)
    assert done.stdout.splitlines()[-1] == "Qwen3MLAForCausalLM", done.stderr


@pytest.mark.compat
def test_text_generation_pipeline(tmp_path: Path) -> None:
    MHA2MLA(kv_cache_ratio=0.5)(source_model("llama", eos_token_id=5)).save_pretrained(tmp_path)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w3"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w5")
    tokenizer.save_pretrained(tmp_path)
    generate = pipeline("text-generation", model=str(tmp_path))
    single = generate("w7 w8 w9", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    assert single.startswith("w7 w8 w9")
    assert len(single.split()) > 3
    batch = generate(["w7 w8 w9", "w11"], max_new_tokens=5, do_sample=False, batch_size=2)  # left-padded
    assert batch[0][0]["generated_text"] == single


def test_random_initialization_is_usable_and_seeded() -> None:
    config = MHA2MLA(kv_cache_ratio=0.5)(source_model("llama")).config
    torch.manual_seed(3)
    first = AutoModelForCausalLM.from_config(config)
    torch.manual_seed(3)
    second = AutoModelForCausalLM.from_config(config)
    assert first.model.layers[0].self_attn.rope_pairs.tolist() == [[0], [0]]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert 0.015 < first.model.layers[0].self_attn.kv_b_proj.weight.std() < 0.025
    assert SIZES["num_hidden_layers"] == len(first.model.layers)
    assert FAMILIES["llama"][0] == "Llama"
