"""`convert` on the embedded reference model: what it writes, what it refuses, and that nothing is left half-written."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig

from optimum_mla import GQA2MLA
from optimum_mla.calibrate import with_repeats
from optimum_mla.calibrate.text import text_beginning, token_windows
from optimum_mla.core.errors import (
    CalibrationDataError,
    CorruptWeightsError,
    InvalidValueError,
    MLAError,
    OptionError,
    OutputError,
    UnsupportedModelError,
)
from optimum_mla.measure.memory import bytes_per_token
from optimum_mla.measure.quality import perplexity
from optimum_mla.pipeline import TextOptions, convert
from optimum_mla.pipeline.calibrating import calibrate
from optimum_mla.pipeline.inspecting import inspect
from optimum_mla.report.render import choices, summary_table
from optimum_mla.report.schema import ConversionReport
from optimum_mla.report.verdict import conversion_verdict
from tests.cases import UNCALIBRATED, source_model, token_ids

REFERENCE = Path(__file__).resolve().parents[1] / "benchmarks" / "reference_model"
EVALUATION = REFERENCE / "evaluation.txt"
CALIBRATION = str(REFERENCE / "calibration.txt")
FEW_WINDOWS = TextOptions(
    calibration_data=str(REFERENCE / "calibration.txt"),
    calibration_samples=2,
    calibration_length=64,
    eval_length=64,
    eval_data=str(EVALUATION),
    eval_samples=4,
)


@pytest.fixture
def altered_reference(tmp_path: Path) -> Callable[[dict[str, Any]], str]:
    """A copy of the reference model with another config."""

    def make(changes: dict[str, Any]) -> str:
        folder = tmp_path / "altered"
        shutil.copytree(REFERENCE, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        return str(folder)

    return make


@pytest.mark.parametrize("method", ["gqa2mla", "mha2mla", "x-ecomla"])
def test_report_tells_what_the_saved_model_measures(method: str, tmp_path: Path) -> None:
    report = convert(str(REFERENCE), tmp_path / "out", method, {"kv_cache_ratio": 0.5}, FEW_WINDOWS, dtype="float32")

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    windows = token_windows(tokenizer, EVALUATION, 64, 4)
    assert perplexity(model, windows) == pytest.approx(report.perplexity_after, rel=1e-5)
    assert bytes_per_token(model, windows[:1]).live == report.cache_bytes_per_token
    assert report.cache_bytes_per_token == report.predicted_cache_bytes_per_token
    assert report.cache_percent_of_source == 50.0
    source = AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32)
    assert perplexity(source, windows) == pytest.approx(report.perplexity_before, rel=1e-5)
    assert model.num_parameters() - source.num_parameters() == report.parameters_added
    assert ConversionReport.read(tmp_path / "out") == report
    assert [layer.layer for layer in report.layers] == list(range(6))
    assert all(layer.output_error > 0 for layer in report.layers)
    assert all(0 < layer.healed_error <= layer.state_error < 1 for layer in report.layers)
    assert {"config.json", "README.md", "conversion_report.json", "modeling_mla.py", "tokenizer.json"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }


def test_full_rank_keeps_the_trained_model_exactly(tmp_path: Path) -> None:
    report = convert(str(REFERENCE), tmp_path / "out", options={"kv_cache_ratio": 1.0}, dtype="float32")

    source = AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    windows = token_windows(AutoTokenizer.from_pretrained(REFERENCE), EVALUATION, 256, 4)
    with torch.no_grad():
        difference = (model(windows).logits - source(windows).logits).abs().max()
    assert difference <= 1e-4
    assert report.cache_bytes_per_token == report.source_cache_bytes_per_token
    generated = [m.generate(windows[:1, :32], max_new_tokens=32, do_sample=False) for m in (source, model)]
    assert torch.equal(*generated)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_shares_are_of_the_16_bit_cache_in_every_dtype(dtype: str, tmp_path: Path) -> None:
    texts, options = TextOptions(calibration_samples=8, calibration_length=128), {"kv_cache_ratio": 0.25}
    report = convert(str(REFERENCE), tmp_path / "out", options=options, texts=texts, dtype=dtype)
    assert (report.method, report.dtype) == ("gqa2mla", dtype)
    source, result = report.shared_bytes
    assert (source, result) == (1536, 384)
    assert report.cache_percent_of_source == 100 * result / source
    wide = {"bfloat16": 1, "float32": 2}[dtype]
    assert (report.source_cache_bytes_per_token, report.cache_bytes_per_token) == (1536 * wide, 384 * wide)
    said = "\n".join([summary_table([report]), choices(report), conversion_verdict(report)])
    assert "The cache is 25 % of the source's in 16 bits." in said
    assert ("in float32 the result takes 768 a token and the source 3072." in said) == (dtype == "float32")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| cache, bytes per token in 16 bits (measured) | 1536 | 384 (25.0 %) |" in card
    assert ("| the same in float32, as saved | 3072 | 768 |" in card) == (dtype == "float32")
    found = inspect(str(tmp_path / "out"))
    assert (found.source_cache_bytes_per_token, found.cache_bytes_per_token) == (1536, 384)
    data = report.data["calibration-data"]
    assert (data["source"], data["windows"], data["tokens_per_window"]) == ("built-in", 8, 128)
    assert report.layers[0].state_error is not None


def test_the_report_is_made_on_windows_that_nothing_was_fitted_or_chosen_on(tmp_path: Path) -> None:
    texts = TextOptions(calibration_data=CALIBRATION, calibration_samples=16, calibration_length=64)
    report = convert(str(REFERENCE), tmp_path / "out", options={"kv_cache_ratio": 0.5}, texts=texts, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    every = token_windows(tokenizer, CALIBRATION, 64, 18)
    left = every[[8, 17]]  # as they are in the text: none of them repeats itself
    assert report.perplexity_text == "held-back calibration"
    for folder, value in ((str(REFERENCE), report.perplexity_before), (tmp_path / "out", report.perplexity_after)):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert perplexity(model, left) == pytest.approx(value, rel=1e-5)
    assert report.data["held-back"]["sha256"] == hashlib.sha256(left.numpy().tobytes()).hexdigest()
    seen = [number for number in range(18) if number not in (8, 17)]
    start = len(text_beginning(tokenizer))
    fitted = with_repeats(every[seen], texts.calibration_repeats, start)
    assert report.data["calibration-data"]["sha256"] == hashlib.sha256(fitted.numpy().tobytes()).hexdigest()


def test_where_no_window_can_be_left_the_report_says_what_it_is_made_on(tmp_path: Path) -> None:
    texts = TextOptions(calibration_data=CALIBRATION, calibration_samples=3, calibration_length=64)
    report = convert(str(REFERENCE), tmp_path / "out", options={"kv_cache_ratio": 0.5}, texts=texts)
    assert report.perplexity_text == "calibration"
    assert "on the calibration text the perplexity" in conversion_verdict(report).lower()
    assert "held-back" not in report.data


def test_statistics_of_the_built_in_text_leave_the_windows_of_the_report(tmp_path: Path) -> None:
    texts = TextOptions(calibration_samples=16, calibration_length=64)
    calibrate(str(REFERENCE), tmp_path / "statistics", texts)
    stored = TextOptions(statistics=str(tmp_path / "statistics"))
    reports = [
        convert(str(REFERENCE), tmp_path / name, options={"kv_cache_ratio": 0.5}, texts=given)
        for name, given in (("stored", stored), ("walked", texts))
    ]
    assert [report.perplexity_text for report in reports] == ["built-in", "held-back calibration"]
    # The same windows, which neither the statistics nor the walk have seen.
    assert reports[0].data["held-back"] == reports[1].data["held-back"]
    assert reports[0].perplexity_before == pytest.approx(reports[1].perplexity_before, rel=1e-5)


def test_the_report_has_the_sources_own_answers(tmp_path: Path) -> None:
    same = convert(str(REFERENCE), tmp_path / "same", options={"kv_cache_ratio": 1.0}, dtype="float32")
    assert same.answers is not None
    assert same.answers["tokens"] == 8 * 32
    assert same.answers["divergence_nats"] < 1e-6
    assert same.sample is not None
    assert same.sample["source"] == same.sample["result"] != ""
    moved = convert(str(REFERENCE), tmp_path / "moved", "x-ecomla", {"kv_cache_ratio": 0.25}, UNCALIBRATED)
    assert moved.answers is not None
    assert moved.answers["divergence_nats"] > 0.1
    assert moved.answers["same_guess_percent"] < 90
    changed = f"{100 - moved.answers['same_guess_percent']:.1f} % of the first guesses changed"
    assert changed in conversion_verdict(moved)
    assert moved.quality_warning is not None


# Five windows are read: one is left to the report.
DEGENERATE = {
    "one word": ("rain " * 400, r"calibration-data: the 5 windows of 64 tokens hold only [1-7] different tokens"),
    "one token": ([7] * 400, "calibration-data: the 5 windows of 64 tokens hold only one token over and over"),
    "padding": ([0] * 400, "calibration-data: the 5 windows of 64 tokens hold only one token over and over"),
    "one window": (list(range(100, 164)) * 8, "calibration-data: all 5 windows of 64 tokens are the same"),
}


@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("write", [convert, calibrate])
def test_a_text_that_says_nothing_is_named_before_the_model_is_loaded(
    case: str, write: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, words = DEGENERATE[case]
    if isinstance(text, str):
        (tmp_path / "text.txt").write_text(text)
        text = str(tmp_path / "text.txt")
    monkeypatch.setattr("optimum_mla.pipeline.checkpoint.Checkpoint.load", None)
    texts = TextOptions(calibration_data=text, calibration_samples=4, calibration_length=64)
    with pytest.raises(CalibrationDataError, match=rf"^{words}.*\. Give ordinary text"):
        write(str(REFERENCE), tmp_path / "out", texts=texts)
    assert not (tmp_path / "out").exists()


def test_evaluation_tokens_of_another_vocabulary_are_named(tmp_path: Path) -> None:
    texts = replace(FEW_WINDOWS, eval_data=[5, 10**6] * 200, eval_samples=2)
    with pytest.raises(InvalidValueError, match=r"eval-data: got 'ids 5 to 1000000', allowed: 0 to \d+"):
        convert(str(REFERENCE), tmp_path / "out", options={"kv_cache_ratio": 0.5}, texts=texts)


def test_tokens_that_say_nothing_are_named_in_python_too() -> None:
    model = source_model("llama")
    with pytest.raises(CalibrationDataError, match="hold only one token over and over"):
        GQA2MLA(kv_cache_ratio=0.5, calibration=torch.full((8, 16), 5))(model)
    with pytest.raises(CalibrationDataError, match="all 8 windows of 16 tokens are the same"):
        GQA2MLA(kv_cache_ratio=0.5, calibration=token_ids(1, 16).repeat(8, 1))(model)


def test_same_input_gives_the_same_weights(tmp_path: Path) -> None:
    for name in ("first", "second"):
        convert(str(REFERENCE), tmp_path / name, "mha2mla", {"kv_cache_ratio": 0.5}, FEW_WINDOWS)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_energy_gives_layers_of_their_own_rank(tmp_path: Path) -> None:
    report = convert(str(REFERENCE), tmp_path / "out", "x-ecomla", {"energy": 0.9, "q_energy": 0.9}, UNCALIBRATED)
    ranks = [layer.kv_lora_rank for layer in report.layers]
    assert len(set(ranks)) > 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert [g.kv_lora_rank for g in model.geometry.layers] == ranks
    assert [g.q_lora_rank for g in model.geometry.layers] == [layer.q_lora_rank for layer in report.layers]


def test_overwrite_replaces_a_model_and_only_a_model(tmp_path: Path) -> None:
    output = tmp_path / "out"
    convert(str(REFERENCE), output, options={"kv_cache_ratio": 0.5}, texts=UNCALIBRATED)
    (output / "stale.txt").write_text("old")
    report = convert(str(REFERENCE), output, options={"kv_cache_ratio": 0.25}, texts=UNCALIBRATED, overwrite=True)
    assert ConversionReport.read(output) == report
    assert not (output / "stale.txt").exists()

    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="no model"):
        convert(str(REFERENCE), precious, overwrite=True)
    assert (precious / "thesis.txt").read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "precious"]


BAD_INPUT: dict[str, tuple[type[MLAError], str, dict[str, Any]]] = {
    "missing folder": (UnsupportedModelError, "no such folder", {"model": "no/such-folder"}),
    "rank too high": (InvalidValueError, "2 to 128", {"options": {"kv_lora_rank": 129}, "texts": UNCALIBRATED}),
    "rank zero": (InvalidValueError, "from 1", {"options": {"kv_lora_rank": 0}}),
    "ratio too high": (InvalidValueError, "up to 1", {"options": {"kv_cache_ratio": 1.2}}),
    "ratio too low": (InvalidValueError, "0.07031", {"method": "mha2mla", "options": {"kv_cache_ratio": 0.01}}),
    "two sizes": (InvalidValueError, "one of them", {"options": {"kv_cache_ratio": 0.5, "energy": 0.5}}),
    "odd rotary dim": (InvalidValueError, "even", {"method": "mha2mla", "options": {"qk_rope_head_dim": 5}}),
    "rotary dim too large": (InvalidValueError, "2 to 30", {"method": "mha2mla", "options": {"qk_rope_head_dim": 32}}),
    "layer beyond the model": (InvalidValueError, "0 to 5", {"options": {"layers": "4-6"}}),
    "malformed layers": (InvalidValueError, "0 to 5", {"options": {"layers": "one"}}),
    "unknown method": (InvalidValueError, "gqa2mla", {"method": "gqa2mlaa"}),
    "option of another method": (OptionError, "gqa2mla has no --q-lora-rank option", {"options": {"q_lora_rank": 8}}),
    "query rank too high": (InvalidValueError, "1 to 256", {"method": "x-ecomla", "options": {"q_lora_rank": 257}}),
    "contribution without text": (
        InvalidValueError,
        "calibration",
        {"method": "mha2mla", "options": {"rope_selection": "contribution"}, "texts": UNCALIBRATED},
    ),
    "text beside no calibration": (
        OptionError,
        "exclude each other",
        {"texts": TextOptions(calibration_data=str(EVALUATION), uncalibrated=True)},
    ),
    "chats without a file": (OptionError, "--calibration-data", {"texts": TextOptions(chat_template=True)}),
    "a paper's form by default": (
        OptionError,
        "uses no calibration data",
        {"options": {"factorization": "split", "positional": "full"}},
    ),
    "unknown dtype": (InvalidValueError, "bfloat16", {"dtype": "int3"}),
    "unknown device": (InvalidValueError, "device", {"device": "abacus"}),
    "text too short": (CalibrationDataError, "fewer than one sample", {"texts": TextOptions(eval_data="SHORT")}),
    "no text file": (
        CalibrationDataError,
        "missing.txt could not be read: .*No such file",
        {"texts": TextOptions(calibration_data="missing.txt")},
    ),
    "window beyond the context": (
        InvalidValueError,
        "2 to 512",
        {"texts": TextOptions(eval_data=str(EVALUATION), calibration_length=513)},
    ),
    "no samples": (InvalidValueError, "from 1", {"texts": TextOptions(eval_data=str(EVALUATION), eval_samples=0)}),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_named_and_writes_nothing(case: str, tmp_path: Path) -> None:
    error, words, arguments = BAD_INPUT[case]
    (tmp_path / "short.txt").write_text("Too short.")
    if arguments.get("texts") == TextOptions(eval_data="SHORT"):
        arguments = {"texts": TextOptions(eval_data=str(tmp_path / "short.txt"))}
    with pytest.raises(error, match=words):
        convert(**{"model": str(REFERENCE), "output": tmp_path / "out", **arguments})
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt2"}, "supported: .*llama, .*mistral, .*qwen2, .*qwen3"),
        ({"model_type": "no_such_type"}, "did not load"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "weights of .* did not load"),
        ({"model_type": "llama_mla"}, "converted already"),
        ({"num_hidden_layers": 7}, "layers.6"),
    ],
)
def test_unsuitable_configs_are_refused(
    altered_reference: Callable[[dict[str, Any]], str], changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(MLAError, match=words):
        convert(altered_reference(changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path / "bert")
    with pytest.raises(UnsupportedModelError, match="'bert'"):
        convert(str(tmp_path / "bert"), tmp_path / "out")


def test_nan_weights_are_refused(altered_reference: Callable[[dict[str, Any]], str], tmp_path: Path) -> None:
    folder = Path(altered_reference({}))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.3.mlp.up_proj.weight"][5, 7] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptWeightsError, match=r"layers\.3\.mlp\.up_proj"):
        convert(str(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_output_must_not_be_the_input_or_stand_already(
    altered_reference: Callable[[dict[str, Any]], str], tmp_path: Path
) -> None:
    folder = altered_reference({})
    with pytest.raises(OutputError, match="is the input"):
        convert(folder, f"{folder}/../altered", overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        convert(folder, tmp_path / "file", overwrite=True)
    with pytest.raises(OutputError, match="--overwrite"):
        convert(str(REFERENCE), folder)
