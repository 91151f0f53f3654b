"""`mla-inspect` beside what conversions really give."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel

from optimum_mla import GQA2MLA, MHA2MLA, XEcoMLA
from optimum_mla.errors import UnsupportedModelError
from optimum_mla.pipeline import TextOptions, convert, inspect
from optimum_mla.report.inspection import inspection_text
from optimum_mla.report.memory import resident_peak_bytes
from tests.cases import FAMILIES, source_model, token_ids

REFERENCE = Path(__file__).resolve().parents[1] / "benchmarks" / "reference_model"
PROGRAM = str(Path(sys.executable).with_name("optimum-cli"))


@pytest.mark.parametrize("family", FAMILIES)
def test_choices_are_what_conversions_give(family: str, tmp_path: Path) -> None:
    source = source_model(family, torch.bfloat16)
    source.save_pretrained(tmp_path)
    found = inspect(str(tmp_path), (0.5,))
    assert (found.state, found.reason, found.dtype) == ("convertible", None, "bfloat16")
    assert found.parameters == source.num_parameters()
    assert found.weight_bytes == 2 * source.num_parameters()
    assert found.source_cache_bytes_per_token == found.cache_bytes_per_token
    choices = {choice.method: choice for choice in found.choices}
    made = {
        "gqa2mla --positional full": GQA2MLA(kv_cache_ratio=0.5, positional="full", calibration=token_ids(4, 24)),
        "mha2mla": MHA2MLA(kv_cache_ratio=0.5, calibration=token_ids(4, 24), qk_rope_head_dim=4),
        "x-ecomla": XEcoMLA(kv_cache_ratio=0.5, calibration=token_ids(4, 24), qk_rope_head_dim=8),
    }
    for name, method in made.items():
        converted = method(source_model(family, torch.bfloat16))
        choice = choices[name]
        assert choice.problem is None
        # Ranks may move between layers of one total; where layers choose R, parameters are those of the planned one.
        assert choice.cache_numbers_per_token == pytest.approx(converted.geometry.cache_numbers, abs=3)
        assert choice.cache_bytes_per_token == 2 * choice.cache_numbers_per_token
        assert choice.cache_percent_of_source == pytest.approx(100 * converted.geometry.cache_ratio, abs=1)
        if name == "gqa2mla --positional full":
            assert choice.parameters_added == converted.num_parameters() - source.num_parameters()


def test_features_and_blockers_are_named(tmp_path: Path) -> None:
    wanted = {
        "llama": ([], {}),
        "llama with biases": (["query biases", "key and value biases"], {"llama.cpp (deepseek2)": "biases"}),
        "llama with yarn": (["yarn rotary scaling"], {}),
        "llama multi-head, tied": (["tied embeddings"], {}),
        "mistral with a window": (["sliding windows"], {"plain Transformers (deepseek_v3)": "sliding windows"}),
        "qwen3": (["norms on queries and keys"], {"plain Transformers (deepseek_v3)": "norms on queries and keys"}),
    }
    for number, (family, (features, blocked)) in enumerate(wanted.items()):
        source_model(family).save_pretrained(tmp_path / str(number))
        found = inspect(str(tmp_path / str(number)))
        assert found.features == features
        engines = {engine.engine: engine for engine in found.engines}
        assert engines["Transformers with optimum-mla"].blockers == []
        for name, reason in blocked.items():
            assert any(reason in blocker for blocker in engines[name].blockers)
        if not blocked:
            assert engines["plain Transformers (deepseek_v3)"].blockers == []
        # 64 numbers per token are fewer than any kernel's latent.
        assert "larger than the source's" in engines["FlashMLA kernels"].blockers[0] or blocked


def test_kernels_say_what_they_cost(tmp_path: Path) -> None:
    changes = {"hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 128}
    source_model("llama", torch.bfloat16, **changes, num_hidden_layers=1).save_pretrained(tmp_path)
    engines = {engine.engine: engine for engine in inspect(str(tmp_path)).engines}
    assert engines["FlashMLA kernels"].options.endswith("--kv-lora-rank 512 --qk-rope-head-dim 64")
    assert engines["FlashMLA kernels"].cache_percent_of_source == 100 * 576 / 1024


@pytest.mark.parametrize(
    ("method", "blocked"),
    [
        (lambda: XEcoMLA(kv_cache_ratio=0.5), []),
        (lambda: MHA2MLA(kv_cache_ratio=0.5), ["a rotary key per head"]),
        (lambda: GQA2MLA(kv_cache_ratio=0.5), ["layers without a decoupled rotary key"]),
    ],
)
def test_a_converted_model_says_who_runs_it(method: Any, blocked: list[str], tmp_path: Path) -> None:
    model = method()(source_model("llama"))
    model.save_pretrained(tmp_path)
    found = inspect(str(tmp_path))
    assert (found.state, found.choices, found.conversion_memory_bytes) == ("converted", [], None)
    assert found.cache_bytes_per_token == 4 * model.geometry.cache_numbers
    engines = {engine.engine: engine.blockers for engine in found.engines}
    assert engines["plain Transformers (deepseek_v3)"] == blocked
    assert engines["FlashMLA kernels"] == (blocked or ["rank 24, it takes 512", "8 rotary dims, it takes 64"])


@pytest.mark.parametrize("shared", [True, False])
def test_frequencies_chosen_by_layer_block_engines(shared: bool, tmp_path: Path) -> None:
    options = {"kv_cache_ratio": 0.5, "rope_cache": "cached", "qk_rope_head_dim": 16, "shared_rope": shared}
    texts = TextOptions(
        calibration_data=str(REFERENCE / "calibration.txt"), calibration_samples=4, calibration_length=32
    )
    convert(str(REFERENCE), tmp_path / "out", "gqa2mla", options, texts)
    engines = {engine.engine: engine.blockers for engine in inspect(str(tmp_path / "out")).engines}
    assert engines["Transformers with optimum-mla"] == []
    assert bool(engines["plain Transformers (deepseek_v3)"]) == (not shared)
    assert shared or "--shared-rope" in engines["llama.cpp (deepseek2)"][0]


def test_a_checkpoint_larger_than_memory_is_no_matter(tmp_path: Path) -> None:
    AutoConfig.from_pretrained(REFERENCE).save_pretrained(tmp_path)
    rows, width = 2**20, 2**15  # 64 GiB in 16 bits
    entry = {"dtype": "BF16", "shape": [rows, width], "data_offsets": [0, 2 * rows * width]}
    header = json.dumps({"weight": entry}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2 * rows * width)  # a file of holes
    before = resident_peak_bytes()
    found = inspect(str(tmp_path))
    assert (found.parameters, found.weight_bytes) == (rows * width, 2 * rows * width)
    assert resident_peak_bytes() - before < 2**28


def test_what_cannot_be_converted_says_why(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50)).save_pretrained(tmp_path / "gpt2")
    found = inspect(str(tmp_path / "gpt2"))
    assert found.state == "not convertible"
    assert found.reason is not None
    assert "model_type: got 'gpt2', supported: llama" in found.reason
    assert inspection_text(found).splitlines()[1].startswith("not convertible: model_type")

    source_model("llama").save_pretrained(tmp_path / "packed")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    assert inspect(str(tmp_path / "packed")).reason == "its weights are quantized; convert the unquantized model"


def test_bad_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="nowhere did not load"):
        inspect(str(tmp_path / "nowhere"))
    AutoConfig.from_pretrained(REFERENCE).save_pretrained(tmp_path / "empty")
    with pytest.raises(UnsupportedModelError, match="holds no safetensors files"):
        inspect(str(tmp_path / "empty"))
    (tmp_path / "empty" / "model.safetensors").write_bytes(b"\x10\x00\x00\x00")
    with pytest.raises(UnsupportedModelError, match="holds a broken safetensors file"):
        inspect(str(tmp_path / "empty"))


def test_a_ratio_that_a_method_cannot_have_is_a_note() -> None:
    found = inspect(str(REFERENCE), (0.125, 1.0))
    assert [choice.method for choice in found.choices if choice.problem] == ["x-ecomla"]
    text = inspection_text(found)
    assert "x-ecomla, 0.125: kv_cache_ratio: got 0.125" in text
    assert "gqa2mla, 1 " in text


def test_the_command_prints_text_or_json() -> None:
    done = subprocess.run([PROGRAM, "mla-inspect", str(REFERENCE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "convertible" in done.stdout
    assert "the source caches 1,536 bytes per token" in done.stdout
    done = subprocess.run(
        [PROGRAM, "mla-inspect", str(REFERENCE), "--json", "--kv-cache-ratios", "0.25"], capture_output=True, text=True
    )
    content = json.loads(done.stdout)
    assert {choice["kv_cache_ratio"] for choice in content["choices"]} == {0.25}
    assert content["choices"][0]["cache_percent_of_source"] == 25.0
    assert content["conversion_memory_bytes"] > content["weight_bytes"]
