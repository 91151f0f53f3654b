"""`mla-convert --cache-budget`: a folder that is its source with a codec, or the codec alone, and what is refused."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from optimum_mla import load_codec
from optimum_mla.cache.settings import CacheSettings
from optimum_mla.core.errors import (
    InvalidValueError,
    OptionError,
    OutputError,
    UnsupportedModelError,
    VerificationError,
)
from optimum_mla.models.codec import CODEC_FILE, ModelCodec
from optimum_mla.models.coded import CodedGeneration
from optimum_mla.pipeline import TextOptions, benchmark, calibrate, convert, quantize
from optimum_mla.pipeline.benchmarking.options import BenchmarkOptions
from optimum_mla.pipeline.checkpoint import Checkpoint
from optimum_mla.pipeline.origin import recorded_source
from optimum_mla.pipeline.unfinished import Unfinished
from optimum_mla.report.schema import CodecReport
from optimum_mla.report.verdict import codec_verdict
from tests.cases import source_model, token_ids

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "benchmarks" / "reference_model"
PROGRAM = str(Path(sys.executable).with_name("optimum-mla"))
TEXT = str(REFERENCE / "calibration.txt")
LAYERS = 6  # of the reference model
FEW = TextOptions(calibration_data=TEXT, calibration_samples=8, calibration_length=288)


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("coded") / "out"
    convert(str(REFERENCE), output, options={"kv_cache_budget": 0.125}, texts=FEW)
    return output


def test_the_folder_is_the_source_with_a_codec(coded: Path) -> None:
    assert (coded / "model.safetensors").read_bytes() == (REFERENCE / "model.safetensors").read_bytes()
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (REFERENCE, coded))
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"latent_codec", "auto_map"}
    model: Any = AutoModelForCausalLM.from_pretrained(coded)
    assert isinstance(model, CodedGeneration)
    report, codec = CodecReport.read(coded), model.latent_codec
    assert report.coded_bytes_per_token == codec.bytes_per_token == 192
    assert report.source_bytes_per_token == 1536
    assert report.percent_of_long_caches == pytest.approx(12.5)
    exact = 4 + 64 + (4096 - 64) % 64
    assert report.percent_at_stated_tokens == pytest.approx(
        100 * ((4096 - exact + 4) * 192 + exact * 1536) / 4096 / 1536
    )
    assert report.codec_bytes == (coded / CODEC_FILE).stat().st_size
    assert report.perplexity_after == pytest.approx(report.perplexity_before, rel=0.02)
    assert report.divergence_nats is not None
    assert 0 < report.divergence_nats < 0.02
    assert report.verification is not None
    assert report.verification["largest_logit_difference"] == 0
    assert report.verification["cache_bytes_live"] == report.verification["cache_bytes_predicted"]
    assert sum(layer.bytes_per_token for layer in report.layers) == 192
    source = recorded_source(Checkpoint(str(coded)))
    assert source is not None
    assert Path(source.location) == REFERENCE


def test_the_card_runs(coded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    card = (coded / "README.md").read_text(encoding="utf-8")
    assert "14.0" in card
    (code,) = (part.split("```")[0] for part in card.split("```python\n")[1:])
    monkeypatch.chdir(coded.parent)
    exec(code.replace("max_new_tokens=200", "max_new_tokens=4"), {})
    assert "old house" in capsys.readouterr().out


def test_the_command_writes_the_codec_alone(coded: Path, tmp_path: Path) -> None:
    output = tmp_path / "codec"
    done = subprocess.run(
        [
            *(PROGRAM, "mla-convert", "-m", str(REFERENCE), "--cache-budget", "0.125", "--codec-only"),
            *("--calibration-data", TEXT, "--calibration-samples", "8", "--calibration-length", "288", str(output)),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in output.iterdir()) == ["README.md", "codec_report.json", CODEC_FILE]
    assert "codes of old tokens in 12.5 % of their bytes in 6 layers; the weights stay as they are." in done.stdout
    assert "bytes of an old token" in done.stdout
    assert codec_verdict(CodecReport.read(output)) in done.stdout
    assert f"Next: load it in Python by optimum_mla.load_codec(model, '{output}')" in done.stdout
    model: Any = load_codec(AutoModelForCausalLM.from_pretrained(REFERENCE), output)
    assert isinstance(model, CodedGeneration)
    # The same text gives the same codec; the processor may round sums differently in another process.
    one, other = (load_file(folder / CODEC_FILE) for folder in (coded, output))
    torch.testing.assert_close(other, one)


def test_without_a_size_the_weights_stay(tmp_path: Path) -> None:
    said: list[str] = []
    report = convert(str(REFERENCE), tmp_path / "out", texts=FEW, announce=said.append)
    assert isinstance(report, CodecReport)
    assert report.kv_cache_budget == 0.25
    assert "25 % of their bytes" in said[0]


def test_statistics_and_the_users_text(coded: Path, tmp_path: Path) -> None:
    calibrate(str(REFERENCE), tmp_path / "statistics", FEW)
    texts = TextOptions(
        statistics=str(tmp_path / "statistics"), eval_data=str(REFERENCE / "evaluation.txt"), eval_samples=2
    )
    report: Any = convert(str(REFERENCE), tmp_path / "out", options={"kv_cache_budget": 0.125}, texts=texts)
    assert report.coded_bytes_per_token <= 192
    assert report.quality_text == "evaluation"
    assert report.scored_tokens == 2 * 256
    assert report.divergence_nats < 0.05
    assert report.data["calibration-data"]["statistics"]


def test_quantized_weights_are_copied_as_they_are(tmp_path: Path) -> None:
    source_model("llama", intermediate_size=128).save_pretrained(tmp_path / "plain")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=quantization).save_pretrained(
        tmp_path / "nf4"
    )
    texts = TextOptions(calibration_data=token_ids(1, 1600)[0].tolist(), calibration_samples=8, calibration_length=96)
    convert(str(tmp_path / "nf4"), tmp_path / "out", options={"kv_cache_budget": 0.4}, texts=texts)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "nf4" / "model.safetensors"
    ).read_bytes()
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(model, CodedGeneration)
    assert type(model.model.layers[0].self_attn.k_proj).__name__ == "Linear4bit"


def test_a_benchmark_measures_the_codes_beside_the_source(coded: Path, tmp_path: Path) -> None:
    options = BenchmarkOptions(
        caches=("default", "16bit"),
        context_lengths=(200,),
        batch_sizes=(2,),
        parts=("memory", "quality"),
        eval_data=str(REFERENCE / "evaluation.txt"),
        eval_samples=1,
        eval_length=160,
        stride=8,
    )
    report = benchmark(str(coded), tmp_path / "report", options=options, formats=("json",))
    assert report.baseline == str(REFERENCE)
    rows = {(row.role, row.cache): row for row in report.memory}
    own, source = rows["model", "default"], rows["baseline", "default"]
    assert own.problem is None
    assert own.live_cache_bytes == own.predicted_cache_bytes == 2 * ModelCodec.load(coded).cache_bytes(200, 2)
    assert rows["model", "16bit"].live_cache_bytes == source.live_cache_bytes == 2 * 200 * 1536
    quality = {(row.role, row.cache): row for row in report.quality}
    assert 0 < (quality["model", "default"].kl_nats or 0) < 0.1
    with pytest.raises(InvalidValueError, match="cache: got 'hqq-int4', allowed: default, 16bit, as the model has a"):
        benchmark(str(coded), tmp_path / "other", options=BenchmarkOptions(caches=("hqq-int4",)))


def test_a_folder_with_a_codec_is_a_source_again(coded: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="has the weights of its source, and a codec beside them"):
        quantize(str(coded), tmp_path / "quantized", CacheSettings(bits=4))
    report: Any = convert(str(coded), tmp_path / "out", options={"kv_cache_budget": 0.25}, texts=FEW)
    assert report.percent_of_long_caches == pytest.approx(25)
    convert(str(coded), tmp_path / "latent", "mha2mla", {"kv_cache_ratio": 0.5}, FEW)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "latent")).__name__ == "LlamaMLAForCausalLM"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a")["input_ids"]


def test_layers_on_the_disk_give_the_same_codec(coded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optimum_mla.pipeline.checkpoint.RESIDENT_BYTES", 0)
    convert(str(REFERENCE), tmp_path / "out", options={"kv_cache_budget": 0.125}, texts=FEW)
    one, other = (load_file(folder / CODEC_FILE) for folder in (coded, tmp_path / "out"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_short_windows_measure_nothing_and_say_so(tmp_path: Path) -> None:
    texts = TextOptions(calibration_data=TEXT, calibration_samples=8, calibration_length=96)
    report: Any = convert(str(REFERENCE), tmp_path / "out", options={"kv_cache_budget": 0.125}, texts=texts)
    assert report.divergence_nats is None
    assert "was not measured, as there was no text in windows long enough" in codec_verdict(report)


@pytest.mark.parametrize("name", ["layer 0", "layer 4", "gradient 5", "gradient 0"])
def test_an_interrupted_fit_goes_on(
    name: str, coded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options, keep, output = {"kv_cache_budget": 0.125}, Unfinished.keep_tensors, tmp_path / "out"
    done: list[str] = []

    def stopping(self: Unfinished, kept: str, tensors: Any, **said: Any) -> None:
        done.append(kept)
        keep(self, kept, tensors, **said)
        if kept == name:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Unfinished, "keep_tensors", stopping)
        with pytest.raises(KeyboardInterrupt):
            convert(str(REFERENCE), output, options=options, texts=FEW)
        assert "fitted layers. The same command with --resume goes on." in caplog.text
        assert not output.exists()
        with pytest.raises(OutputError, match=r"an unfinished conversion to .* Go on with it by --resume"):
            convert(str(REFERENCE), output, options=options, texts=FEW)
        with pytest.raises(OptionError, match=r"another one: kv_cache_budget is 0\.25 and was 0\.125"):
            convert(str(REFERENCE), output, options={"kv_cache_budget": 0.25}, texts=FEW, resume=True)
        name = "nothing"
        convert(str(REFERENCE), output, options=options, texts=FEW, resume=True)
    assert len(done) == len(set(done)) == 2 * LAYERS  # Nothing was done twice.
    one, other = (load_file(folder / CODEC_FILE) for folder in (coded, output))
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_was_kept_and_damaged_is_made_again(
    coded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options, drop, output = {"kv_cache_budget": 0.125}, Unfinished.drop_tensors, tmp_path / "out"

    def stopping(self: Unfinished, name: str) -> None:
        drop(self, name)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Unfinished, "drop_tensors", stopping)
        with pytest.raises(KeyboardInterrupt):
            convert(str(REFERENCE), output, options=options, texts=FEW)
    kept = sorted((tmp_path / ".out.unfinished").glob("*.safetensors"))
    assert [path.stem for path in kept] == [f"gradient-{LAYERS - 2:05}", *(f"layer-{n:05}" for n in range(LAYERS))]
    for path in (kept[0], kept[2]):
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    convert(str(REFERENCE), output, options=options, texts=FEW, resume=True)
    assert caplog.text.count("is not as it was written; it is made again") == 2
    one, other = (load_file(folder / CODEC_FILE) for folder in (coded, output))
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "about weights": (
        {"options": {"kv_cache_budget": 0.25, "heal": True}},
        InvalidValueError,
        "heal: got True, allowed: nothing with kv_cache_budget",
    ),
    "method": (
        {"method": "x-ecomla", "options": {"kv_cache_budget": 0.25}},
        InvalidValueError,
        "kv_cache_budget: got 0.25, allowed: nothing with x-ecomla",
    ),
    "uncalibrated": (
        {"options": {"kv_cache_budget": 0.25}, "texts": TextOptions(uncalibrated=True)},
        OptionError,
        "--uncalibrated and --cache-budget exclude each other",
    ),
    "codec only": (
        {"options": {"kv_cache_ratio": 0.5}, "codec_only": True},
        OptionError,
        "--codec-only needs --cache-budget",
    ),
    "too small": (
        {"options": {"kv_cache_budget": 0.001}, "texts": FEW},
        InvalidValueError,
        "kv_cache_budget: got 0.001, allowed: 0.0",
    ),
    "too large": (
        {"options": {"kv_cache_budget": 1.0}, "texts": FEW},
        InvalidValueError,
        "kv_cache_budget: got 1.0, allowed: above 0, up to 0.5",
    ),
    "short windows": (
        {"options": {"kv_cache_budget": 0.25}, "texts": TextOptions(calibration_data=TEXT, calibration_length=64)},
        InvalidValueError,
        "calibration_length: got 64, allowed: more than 68",
    ),
    "a layer": (
        {"options": {"kv_cache_budget": 0.25, "layers": "9"}, "texts": FEW},
        InvalidValueError,
        "layers: got '9', allowed: 0 to 5",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_one_line_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    given, kind, said = REFUSED[name]
    with pytest.raises(kind, match=said.replace(".", r"\.")):
        convert(str(REFERENCE), tmp_path / "out", **given)
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_was_checked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match="exists"):
        convert(str(REFERENCE), tmp_path / "out", options={"kv_cache_budget": 0.25}, texts=FEW)
    monkeypatch.setattr("optimum_mla.models.codec.ModelCodec.cache_bytes", lambda self, tokens, itemsize=2: 1)
    with pytest.raises(VerificationError, match=r"bytes, but the layouts predict 2.* 6 fitted layers are kept"):
        convert(str(REFERENCE), tmp_path / "other", options={"kv_cache_budget": 0.25}, texts=FEW)
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".other.unfinished"}


def test_a_damaged_codec_is_said_where_the_model_is_loaded(coded: Path, tmp_path: Path, caplog: Any) -> None:
    for path in coded.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / CODEC_FILE).write_bytes(b"torn")
    with caplog.at_level(logging.WARNING):
        assert not isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), CodedGeneration)
    assert "could not be read" in caplog.text
