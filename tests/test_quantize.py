"""`mla-quantize` on a converted reference model: what it writes, measures and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_mla.cache import CacheSettings
from optimum_mla.calibrate.text import token_windows
from optimum_mla.core.errors import InvalidValueError, OutputError, UnsupportedModelError
from optimum_mla.measure.memory import measured_cache_bytes
from optimum_mla.measure.quality import decoding_perplexity, perplexity
from optimum_mla.pipeline import TextOptions, convert, quantize
from optimum_mla.report.schema import QuantizationReport
from optimum_mla.weights import weight_bytes
from tests.cases import UNCALIBRATED

REFERENCE = Path(__file__).resolve().parents[1] / "benchmarks" / "reference_model"
EVALUATION = str(REFERENCE / "evaluation.txt")
FEW_WINDOWS = TextOptions(eval_data=EVALUATION, eval_samples=4, eval_length=48)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference model at three quarters of its cache."""
    folder = tmp_path_factory.mktemp("models") / "converted"
    convert(str(REFERENCE), folder, "gqa2mla", {"kv_cache_ratio": 0.75}, UNCALIBRATED, dtype="float32")
    return folder


@pytest.mark.compat
def test_report_tells_what_the_saved_model_measures(converted: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = CacheSettings(bits=4, backend="hqq", group_size=32, residual_length=8)
    report = quantize(str(converted), out, settings, texts=FEW_WINDOWS)

    assert report == QuantizationReport(**json.loads((out / "quantization_report.json").read_text()))
    assert report.cache == settings.to_dict()
    model = AutoModelForCausalLM.from_pretrained(out)
    ids = token_windows(AutoTokenizer.from_pretrained(out), EVALUATION, 48, 4, "eval-data")
    assert decoding_perplexity(model, ids, model.make_cache) == pytest.approx(report.perplexity_after, rel=1e-5)
    unquantized = decoding_perplexity(model, ids, lambda: model.make_cache(bits=16))
    assert unquantized == pytest.approx(report.perplexity_before, rel=1e-5)
    assert unquantized == pytest.approx(perplexity(model, ids), rel=1e-4)
    assert report.perplexity_after != report.perplexity_before
    assert report.perplexity_after == pytest.approx(report.perplexity_before, rel=0.03)

    probe = torch.zeros(1, report.context_tokens, dtype=torch.long)
    assert measured_cache_bytes(model, probe, model.make_cache()) == report.cache_bytes_after
    assert report.source_cache_bytes == 6 * 128 * 4 * report.context_tokens
    assert report.cache_bytes_before == 0.75 * report.source_cache_bytes
    # The latents have 48 numbers, in two groups of 24: 4 bits and 32/24 of 32. At most 8 tokens are as they were.
    assert {layer["k_lora_rank"] for layer in json.loads((out / "conversion_report.json").read_text())["layers"]} == {
        48
    }
    quantized = (4 + 32 / 24) / 32 * report.cache_bytes_before
    assert quantized <= report.cache_bytes_after <= quantized + 8 * report.cache_bytes_before / report.context_tokens

    # The conversion's own papers came along.
    assert (out / "conversion_report.json").read_bytes() == (converted / "conversion_report.json").read_bytes()
    card = (out / "README.md").read_text()
    assert "converted by optimum-mla" in card
    assert "4 bits per number of the latent (hqq, groups of 32)" in card


@pytest.mark.parametrize("weights", ["bnb-int8", "bnb-nf4"])
def test_weights_and_cache_in_one_go(weights: str, converted: Path, tmp_path: Path) -> None:
    report = quantize(str(converted), tmp_path / "out", weights=weights, texts=FEW_WINDOWS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    # Once used, bitsandbytes keeps a little beside its layers.
    assert weight_bytes(model) == pytest.approx(report.weight_bytes_after, rel=1e-3)
    assert report.weight_bytes_after < 0.75 * report.weight_bytes_before
    assert model.config.latent_cache["bits"] == 4
    ids = token_windows(AutoTokenizer.from_pretrained(tmp_path / "out"), EVALUATION, 48, 4, "eval-data")
    assert decoding_perplexity(model, ids, model.make_cache) == pytest.approx(report.perplexity_after, rel=1e-3)
    assert report.perplexity_after == pytest.approx(report.perplexity_before, rel=0.2)
    assert f"Weights: {weights}" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(UnsupportedModelError, match=r"weights of .+ are quantized"):
        quantize(str(tmp_path / "out"), tmp_path / "again")


def test_what_cannot_be_quantized_leaves_nothing_behind(converted: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UnsupportedModelError, match="mla-convert"):
        quantize(str(REFERENCE), out)
    with pytest.raises(UnsupportedModelError, match="no such folder"):
        quantize(str(tmp_path / "missing"), out)
    with pytest.raises(InvalidValueError, match="bits"):
        quantize(str(converted), out, CacheSettings(bits=3, backend="quanto"))
    with pytest.raises(InvalidValueError, match="float8"):
        quantize(str(converted), out, dtype="float8")
    with pytest.raises(InvalidValueError, match="Did you mean bnb-int8"):
        quantize(str(converted), out, weights="bnb-int4")
    with pytest.raises(OutputError, match="input model"):
        quantize(str(converted), converted)
    assert list(tmp_path.iterdir()) == []


def test_command_prints_before_and_after(converted: Path, tmp_path: Path) -> None:
    program = str(Path(sys.executable).parent / "optimum-mla")
    options = [
        "--cache-bits",
        "8",
        "--cache-backend",
        "quanto",
        "--residual-length",
        "0",
        "--rope-bits",
        "8",
        "--weights",
        "bnb-int8",
    ]
    text = ["--eval-data", EVALUATION, "--eval-samples", "2", "--eval-length", "32"]
    done = subprocess.run(
        [program, "mla-quantize", "-m", str(converted), *options, *text, str(tmp_path / "out")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = {line.split("  ")[0].strip(): line.split() for line in done.stdout.splitlines() if line}
    before, after = (float(cell) for cell in lines["cache of 512 tokens in float32, MB"][-2:])
    assert 8 / 32 < after / before < 8.4 / 32
    before, after = (float(cell) for cell in lines["weights, MB"][-2:])
    assert after < 0.6 * before
    before, after = (float(cell) for cell in lines["perplexity, token by token"][-2:])
    assert after == pytest.approx(before, rel=0.01)
    refused = subprocess.run(
        [program, "mla-quantize", "-m", str(converted), "--cache-bits", "5", str(tmp_path / "other")],
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith("error: bits: got 5, allowed: 8, 4, 3, 2")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
