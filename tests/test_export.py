"""`mla-export` and `mla-convert --export-format` as a user runs them; results where this package cannot be imported."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_mla import XEcoMLA
from optimum_mla.calibrate.text import token_windows
from optimum_mla.core.errors import InvalidValueError, OutputError, UnsupportedModelError
from optimum_mla.export.deepseek import export_deepseek
from optimum_mla.pipeline import TextOptions, convert, export, finetune
from optimum_mla.recovery.recipe import Recipe
from tests.cases import UNCALIBRATED, source_model, token_ids

REFERENCE = Path(__file__).resolve().parents[1] / "benchmarks" / "reference_model"
PROGRAM = str(Path(sys.executable).with_name("optimum-mla"))
TEXTS = TextOptions(calibration_data=str(REFERENCE / "calibration.txt"), calibration_samples=4, calibration_length=64)

ELSEWHERE = """
    import sys
    sys.modules["optimum_mla"] = None  # importing it fails from here on
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, again, result = sys.argv[1:4]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "DeepseekV3ForCausalLM"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("It was a bright morning", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(ids).logits
    tokens = model.generate(ids, max_new_tokens=16, do_sample=False)
    model.save_pretrained(again)
    with torch.no_grad():
        reloaded = AutoModelForCausalLM.from_pretrained(again)(ids).logits
    save_file({"logits": logits, "reloaded": reloaded, "tokens": tokens, "ids": ids}, result)
"""


LOGITS_ELSEWHERE = """
    import sys
    sys.modules["optimum_mla"] = None
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    found = {}
    for folder in sys.argv[1:]:
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(folder)(load_file(f"{folder}/ids.st")["ids"]).logits
        save_file({"logits": logits}, f"{folder}/logits.st")
"""


def program(text: str) -> str:
    """Without its indentation."""
    return "\n".join(line[4:] for line in text.splitlines())


def elsewhere(folder: Path, scratch: Path) -> dict[str, torch.Tensor]:
    """What a process without this package makes of an export."""
    arguments = [str(folder), str(scratch / "again"), str(scratch / "result.safetensors")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program(ELSEWHERE), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=scratch,
    )
    assert done.returncode == 0, done.stderr
    return load_file(scratch / "result.safetensors")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference model in a form that can be exported."""
    folder = tmp_path_factory.mktemp("models") / "converted"
    options = {"kv_cache_ratio": 0.5, "rope_cache": "cached", "shared_rope": True, "qk_rope_head_dim": 16}
    convert(str(REFERENCE), folder, "gqa2mla", options, TEXTS, dtype="float32")
    return folder


def test_an_export_runs_where_this_package_is_not(converted: Path, tmp_path: Path) -> None:
    report = export(str(converted), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "README.md"} <= names
    assert {"export_report.json", "conversion_report.json"} <= names
    assert "modeling_mla.py" not in names
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "auto_map" not in config
    assert config["model_type"] == "deepseek_v3"
    assert config["first_k_dense_replace"] == config["num_hidden_layers"] == 6
    assert not any(isinstance(value, int) and value > 10**6 for value in config.values())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "This folder is a plain `deepseek_v3` model" in card
    assert "import optimum_mla" not in card
    saved = json.loads((tmp_path / "out" / "export_report.json").read_text())
    assert saved["largest_logit_difference"] == report.largest_logit_difference < 1e-4
    assert report.kv_lora_rank == 64 - 16 + 1

    found = elsewhere(tmp_path / "out", tmp_path)
    native = AutoModelForCausalLM.from_pretrained(converted)
    with torch.no_grad():
        wanted = native(found["ids"]).logits
    assert (found["logits"] - wanted).abs().max() < 1e-4
    assert torch.equal(found["reloaded"], found["logits"])
    assert torch.equal(found["tokens"], native.generate(found["ids"], max_new_tokens=16, do_sample=False))


def test_every_family_runs_where_this_package_is_not(tmp_path: Path) -> None:
    ids, natives = token_ids(), {}
    for family in ("llama", "llama with scaled rope", "mistral", "qwen2"):
        for dtype in (torch.float32, torch.bfloat16):
            folder = tmp_path / f"{family} {dtype}"
            native = XEcoMLA(kv_cache_ratio=0.5)(source_model(family, dtype))
            export_deepseek(native).save_pretrained(folder)
            save_file({"ids": ids}, folder / "ids.st")
            natives[folder] = native
    done = subprocess.run(
        [sys.executable, "-c", program(LOGITS_ELSEWHERE), *map(str, natives)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    for folder, native in natives.items():
        with torch.no_grad():
            wanted = native(ids).logits
        given = load_file(folder / "logits.st")["logits"]
        assert given.dtype is native.dtype
        largest = (given.float() - wanted.float()).abs().max()
        assert largest < (1e-4 if native.dtype is torch.float32 else 0.03 * wanted.float().abs().max())


def test_a_latent_norm_is_trained_through_and_exported(tmp_path: Path) -> None:
    options = {"kv_cache_ratio": 0.5, "rope_cache": "cached", "shared_rope": True, "latent_norm": True}
    convert(str(REFERENCE), tmp_path / "normed", "gqa2mla", {**options, "qk_rope_head_dim": 16}, TEXTS, dtype="float32")
    recipe = Recipe(train="attention", sequence_length=32, train_tokens=128)
    finetune(
        str(tmp_path / "normed"),
        tmp_path / "trained",
        str(REFERENCE / "calibration.txt"),
        recipe,
        {"max_steps": 2, "per_device_train_batch_size": 2},
    )
    gains = [
        load_file(tmp_path / name / "model.safetensors")["model.layers.0.self_attn.kv_a_layernorm.weight"]
        for name in ("normed", "trained")
    ]
    assert not torch.equal(*gains)
    report = export(str(tmp_path / "trained"), tmp_path / "out")
    assert report.largest_logit_difference < 1e-4
    assert json.loads((tmp_path / "out" / "config.json").read_text())["attention_bias"] is False
    assert not any(name.endswith("bias") for name in load_file(tmp_path / "out" / "model.safetensors"))


def test_convert_writes_the_export_itself(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(
                PROGRAM,
                "mla-convert",
                "-m",
                str(REFERENCE),
                "--export-format",
                "deepseek_v3",
                "--kv-cache-ratio",
                "0.5",
            ),
            *("--calibration-data", str(REFERENCE / "calibration.txt"), "--calibration-samples", "4"),
            *("--calibration-length", "64", "--qk-rope-head-dim", "16", str(tmp_path / "out")),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = elsewhere(tmp_path / "out", tmp_path)
    assert found["logits"].dtype is torch.bfloat16
    assert found["tokens"].shape[1] > found["ids"].shape[1]
    report = json.loads((tmp_path / "out" / "export_report.json").read_text())
    assert report["largest_logit_difference"] < 0.05 * report["largest_logit"]
    ids = token_windows(AutoTokenizer.from_pretrained(tmp_path / "out"), str(REFERENCE / "evaluation.txt"), 64, 8)
    source = AutoModelForCausalLM.from_pretrained(REFERENCE)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        losses = [model(ids, labels=ids).loss.item() for model in (source, exported)]
    assert losses[1] == pytest.approx(losses[0], abs=0.3)


def test_the_command_prints_what_came_out(converted: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            PROGRAM,
            "mla-export",
            "-m",
            str(converted),
            "--format",
            "deepseek_v3",
            "--dtype",
            "bfloat16",
            str(tmp_path / "o"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "49 + 16" in done.stdout
    assert "largest logit difference, bfloat16" in done.stdout
    assert next(iter(load_file(tmp_path / "o" / "model.safetensors").values())).dtype is torch.bfloat16


BAD_INPUT: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "another format": (InvalidValueError, r"format: got 'onnx', allowed: deepseek_v3, gguf", {"format": "onnx"}),
    "a type without a file": (
        InvalidValueError,
        "gguf_type: got 'f16'.* nothing with the format",
        {"gguf_type": "f16"},
    ),
    **{
        f"a size beyond memory, {size}": (
            InvalidValueError,
            rf"pad_to: got '{re.escape(size)}', allowed: what fits into memory: .* would take \d+ GB, \d+ GB are free",
            {"pad_to": size},
        )
        for size in ("1000000000+64", "512+1000000000", f"{10**25}+64", f"{10**12}+{10**12}")
    },
    "a size below the model's": (
        InvalidValueError,
        r"pad_to: got '8\+64', allowed: a latent from 49 and an even number of rotary dims from 16",
        {"pad_to": "8+64"},
    ),
    "more windows than can be counted": (
        InvalidValueError,
        "recover_samples: got 1000.*, allowed: integers from 1 to 9223372036854775807",
        {"latent_norm": True, "recover_data": str(REFERENCE / "calibration.txt"), "recover_samples": 10**26},
    ),
    "a size that is none": (InvalidValueError, r"pad_to: got '512'.* RANK\+DIMS, such as 512\+64", {"pad_to": "512"}),
    "a source model": (
        UnsupportedModelError,
        r"is not converted\. Run optimum-cli mla-convert",
        {"model": str(REFERENCE)},
    ),
    "no model": (UnsupportedModelError, "nowhere did not load", {"model": "nowhere"}),
    "a dtype that is none": (InvalidValueError, "dtype: got 'int3'", {"dtype": "int3"}),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_leaves_nothing(case: str, converted: Path, tmp_path: Path) -> None:
    kind, message, changes = BAD_INPUT[case]
    with pytest.raises(kind, match=message):
        export(**{"model": str(converted), "output": tmp_path / "out", **changes})
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists_is_left_alone(converted: Path) -> None:
    with pytest.raises(OutputError, match="input model"):
        export(str(converted), converted)


def test_a_form_that_cannot_be_exported_is_refused_before_any_work(tmp_path: Path) -> None:
    convert(str(REFERENCE), tmp_path / "rebuilt", "gqa2mla", {"kv_cache_ratio": 0.5}, TEXTS)
    with pytest.raises(UnsupportedModelError, match=r"rebuilt from the latent\. Convert with .*--shared-rope"):
        export(str(tmp_path / "rebuilt"), tmp_path / "out")
    with pytest.raises(InvalidValueError, match=r"export_format: .*Give calibration data, or take --method x-ecomla"):
        convert(str(REFERENCE), tmp_path / "out", texts=UNCALIBRATED, export_format="deepseek_v3")


@pytest.mark.parametrize(
    ("model", "method", "message"),
    [("reference_model", "mha2mla", "2 rotary keys"), ("qwen3_model", "x-ecomla", "norms its queries and keys")],
)
def test_what_will_not_export_is_not_converted(
    model: str, method: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optimum_mla.pipeline.checkpoint.Checkpoint.load", None)
    with pytest.raises(UnsupportedModelError, match=message):
        convert(str(REFERENCE.parent / model), tmp_path / "out", method, export_format="deepseek_v3")
    assert list(tmp_path.iterdir()) == []


def test_latent_norms_are_fitted_and_exported(tmp_path: Path) -> None:
    converted, exported = tmp_path / "converted", tmp_path / "exported"
    options = {"kv_cache_ratio": 0.5, "rope_cache": "cached", "shared_rope": True}
    convert(str(REFERENCE), converted, options=options, texts=TEXTS, dtype="float32")
    words = ["mla-export", "-m", str(converted), "--latent-norm", str(exported)]
    refused = subprocess.run([PROGRAM, *words], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "latent_norm: got True, allowed: True together with recover_data" in refused.stderr
    text = ["--recover-data", str(REFERENCE / "calibration.txt"), "--recover-samples", "8", "--recover-length", "64"]
    done = subprocess.run([PROGRAM, *words, *text], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "with latent norms" in done.stdout
    report = json.loads((exported / "export_report.json").read_text(encoding="utf-8"))
    assert (
        1 < report["perplexity_without_norm"] < report["perplexity_with_norm"] < 1.5 * report["perplexity_without_norm"]
    )
    model = AutoModelForCausalLM.from_pretrained(exported)
    assert type(model).__name__ == "DeepseekV3ForCausalLM"
    assert not any("bias" in name and "self_attn" in name for name, _ in model.named_parameters())
    source = AutoModelForCausalLM.from_pretrained(converted)
    assert model.config.kv_lora_rank == source.geometry.layers[0].kv_lora_rank
