"""`mla-benchmark` on a small model and its source: what it measures, flags, skips and refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from optimum.commands.optimum_cli import main
from transformers import AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM

from optimum_mla import GQA2MLA, QuantizeLatentCache, XEcoMLA
from optimum_mla.cache import CacheSettings
from optimum_mla.core.errors import InvalidValueError, MLAError, OutputError, ReportError, ran_out_of_memory
from optimum_mla.pipeline import BenchmarkOptions, benchmark, compare, quantize
from optimum_mla.pipeline.benchmarking import cells, measurements, run
from optimum_mla.pipeline.benchmarking.cells import CellError, run_cell
from optimum_mla.pipeline.benchmarking.measurements import measure_memory, measure_quality, measure_speed
from optimum_mla.pipeline.benchmarking.subjects import Subject
from optimum_mla.pipeline.checkpoint import Checkpoint
from optimum_mla.report.rows import BenchmarkReport
from tests.cases import source_model, token_ids

REFERENCE = Path(__file__).resolve().parents[1] / "benchmarks" / "reference_model"
EVALUATION = str(REFERENCE / "evaluation.txt")
PROGRAM = str(Path(sys.executable).with_name("optimum-mla"))
SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`source`, `converted` from it, and `small`: a model of another vocabulary."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    for name, size in (("source", 4096), ("small", 512)):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": size}))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    model = XEcoMLA(kv_cache_ratio=0.5)(LlamaForCausalLM.from_pretrained(folder / "source"))
    model.save_pretrained(folder / "converted")
    tokenizer.save_pretrained(folder / "converted")
    return folder


def subject(folder: Path, dtype: str = "auto") -> Subject:
    """The model in a folder, on the CPU."""
    return Subject(Checkpoint(str(folder)), dtype, "cpu")


def answered_here(kind: str, request: dict[str, Any]) -> dict[str, Any]:
    """As `run_cell`, without a process of its own, whose start takes seconds; what goes in and out is text as there."""
    found = json.loads(json.dumps(cells.answer(kind, json.loads(json.dumps(request)))))
    if "problem" in found:
        raise CellError(found["problem"])
    return found


@pytest.fixture(scope="module")
def report(models: Path) -> Iterator[BenchmarkReport]:
    """One run with a little of everything; also in the folder `report`. Of each kind one cell is a real process."""
    kinds: set[str] = set()

    def one(kind: str, request: dict[str, Any]) -> dict[str, Any]:
        answer = answered_here if kind in kinds else run_cell
        kinds.add(kind)
        return answer(kind, request)

    options = BenchmarkOptions(
        context_lengths=(1024, 4096),
        batch_sizes=(2,),
        caches=("default", "hqq-int4"),
        new_tokens=2,
        repeats=2,
        eval_data=EVALUATION,
        eval_samples=3,
        eval_length=32,
        stride=8,
        memory_budget=10**9,
        baselines=("source", "source-hqq-int4"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "run_cell", one)
        yield benchmark(str(models / "converted"), models / "report", str(models / "source"), options)


def test_memory_is_what_the_shapes_say(report: BenchmarkReport) -> None:
    rows = {(row.role, row.cache, row.context_tokens): row for row in report.memory}
    assert len(rows) == 8
    source, converted, quantized = (
        rows[key] for key in (("baseline", "default", 1024), ("model", "default", 1024), ("model", "hqq-int4", 1024))
    )
    assert source.live_cache_bytes == source.predicted_cache_bytes == 2 * 1024 * 2 * (2 * 2 * 16) * 4
    assert converted.predicted_cache_bytes == source.live_cache_bytes / 2
    assert 0 < converted.live_cache_bytes - converted.predicted_cache_bytes <= 2 * 2 * 16 * 32 * 4
    assert quantized.live_cache_bytes < 0.8 * converted.live_cache_bytes
    for row in (source, converted, quantized):
        assert row.flags == []
        assert row.problem is None
        assert 100 <= row.live_percent_of_predicted < (105 if row is quantized else 102)
        assert row.prefill_peak_bytes > row.weight_bytes > 0
        assert row.decode_step_peak_bytes is None or row.decode_step_peak_bytes > row.weight_bytes
    theirs = rows["baseline", "hqq-int4", 1024]
    # The prompt's codes take 4.5 bits a number, the last token is not coded yet; its empty buffers add little.
    whole = source.live_cache_bytes / 1024
    assert theirs.live_cache_bytes == pytest.approx(1023 * whole * (4 + 2 * 32 / 64) / 32 + whole, rel=0.01)
    assert (theirs.predicted_cache_bytes, theirs.flags) == (None, [])
    for key, row in rows.items():
        assert (row.problem is not None) == (key[2] == 4096)
    assert rows["model", "default", 4096].problem == "skipped: the model's context ends at 2048 tokens"


def test_the_budget_counts_measured_bytes(report: BenchmarkReport) -> None:
    rows = {(row.role, row.cache): row for row in report.budget}
    assert report.memory_budget_bytes == 10**9
    source = rows["baseline", "default"]
    assert source.cache_bytes_per_token == 2 * (2 * 2 * 16) * 4
    assert source.longest_context_tokens == (10**9 - source.weight_bytes) // 512
    assert rows["model", "default"].longest_context_tokens == pytest.approx(2 * source.longest_context_tokens, rel=0.02)
    assert rows["model", "hqq-int4"].largest_batch > rows["model", "default"].largest_batch > source.largest_batch


def test_speed_is_measured_beside_the_baseline(report: BenchmarkReport) -> None:
    rows = {(row.role, row.cache, row.context_tokens): row for row in report.speed}
    for key, row in rows.items():
        assert (row.problem is None) == (key[2] == 1024)
        if row.problem is None:
            assert (row.repeats, row.steps) == (2, 4)
            assert row.prefill_tokens_per_second > row.decode_tokens_per_second > 0
            assert 0 < row.attention_percent_of_decode < 100
            assert (row.decode_ratio_to_baseline is None) == (key[:2] == ("baseline", "default"))
    source, converted = rows["baseline", "default", 1024], rows["model", "default", 1024]
    ratio = converted.decode_tokens_per_second / source.decode_tokens_per_second
    assert converted.decode_ratio_to_baseline == pytest.approx(ratio)


def test_quality_is_that_of_the_live_cache(report: BenchmarkReport) -> None:
    source, converted, quantized, theirs = report.quality
    assert [(row.role, row.cache) for row in report.quality] == [
        *(("baseline", "default"), ("model", "default"), ("model", "hqq-int4"), ("baseline", "hqq-int4"))
    ]
    # Its prompt was coded, so the source with this cache is not quite the source.
    assert 0 < theirs.kl_nats < converted.kl_nats
    assert theirs.perplexity == pytest.approx(source.perplexity, rel=0.05)
    assert report.data["eval-data"]["windows"] == 3
    assert {row.scored_tokens for row in report.quality} == {24}
    assert source.perplexity > 1
    assert converted.kl_nats > 0
    assert 0 <= converted.agreement_percent <= 100
    # No window is longer than what stays unquantized.
    assert quantized.perplexity == pytest.approx(converted.perplexity, rel=1e-5)


def test_the_report_is_read_as_it_was_written(report: BenchmarkReport, models: Path) -> None:
    assert sorted(path.name for path in (models / "report").iterdir()) == ["report.html", "report.json", "report.md"]
    again = BenchmarkReport.read(models / "report")
    assert json.loads(json.dumps(asdict(again))) == json.loads(json.dumps(asdict(report)))
    assert not again.interrupted
    assert again.cache_numbers_per_token == 64
    assert again.baseline_cache_numbers_per_token == 128


def test_a_cache_of_full_keys_and_values_is_flagged(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the published converters do: the expanded heads are what the cache holds."""

    class FullCache(DynamicCache):
        def update(self, first: Any, second: Any, layer: int, *args: Any, **kwargs: Any) -> Any:
            dense = super().update(first, second, layer, *args, **kwargs)
            self.layers[layer].expanded = torch.zeros(1, 4, dense[0].shape[2], 32)
            return dense

    monkeypatch.setattr(measurements, "cache_maker", lambda model, name: lambda: FullCache(config=model.config))
    row = measure_memory(subject(models / "converted"), "default", 256, 1)
    assert row["live_percent_of_predicted"] > 200
    assert any("of what it should be" in flag for flag in row["flags"])


def test_full_keys_kept_beside_the_cache_are_flagged(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = Subject.load

    def loaded(self: Subject) -> Any:
        model = load(self)
        keep = lambda *_: setattr(model, "leak", torch.zeros(1, 2, 256, 16))  # noqa: E731
        model.register_forward_hook(keep)
        return model

    monkeypatch.setattr(Subject, "load", loaded)
    row = measure_memory(subject(models / "converted"), "default", 256, 1)
    assert row["flags"] == ["alive after a step: [1, 2, 256, 16] float32, as large as the keys of a layer"]


def test_the_table_of_angles_is_nothing_kept_beside_the_cache(tmp_path: Path) -> None:
    """With one key head of 16 bits it is as large as the keys of a layer, but all layers share it."""
    model = source_model("llama", num_attention_heads=4, num_key_value_heads=1, max_position_embeddings=4096)
    converted = GQA2MLA(kv_cache_ratio=0.5, calibration=token_ids(8, 32))(model)
    QuantizeLatentCache(bits=4, backend="hqq")(converted).save_pretrained(tmp_path / "out")
    row = measure_memory(subject(tmp_path / "out", "bfloat16"), "default", 1000, 1)
    assert row["flags"] == []


@pytest.mark.parametrize("weights", ["bnb-int8", "bnb-nf4"])
def test_quantized_weights_are_nothing_kept_beside_the_cache(weights: str, models: Path, tmp_path: Path) -> None:
    """bitsandbytes keeps scales where no other model has tensors."""
    quantize(str(models / "converted"), tmp_path / "out", weights=weights)
    row = measure_memory(subject(tmp_path / "out"), "default", 1, 1)
    assert row["flags"] == []
    source = measure_memory(subject(models / "converted"), "default", 1, 1)
    assert row["weight_bytes"] < source["weight_bytes"]


def test_one_token_of_context_is_no_step(models: Path) -> None:
    row = measure_memory(subject(models / "source"), "default", 1, 3)
    assert row["live_cache_bytes"] == row["predicted_cache_bytes"] == 3 * 2 * (2 * 2 * 16) * 4


def test_cells_without_a_baseline(models: Path) -> None:
    rows = measure_speed(subject(models / "converted"), None, {"model": ["16bit"]}, 8, 1, 1, 1)["rows"]
    assert [(row["role"], row["decode_ratio_to_baseline"]) for row in rows] == [("model", None)]
    windows = torch.randint(4096, (2, 16)).tolist()
    found = measure_quality(subject(models / "converted"), None, "quanto-int8", windows, 4)
    assert found["baseline_perplexity"] is None
    assert found["tokens"] == 8


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells answer in this process."""
    monkeypatch.setattr(run, "run_cell", answered_here)


@pytest.mark.usefixtures("in_process")
def test_a_cell_without_memory_says_so_and_the_run_goes_on(models: Path, tmp_path: Path) -> None:
    options = BenchmarkOptions(
        context_lengths=(64,), batch_sizes=(10**9, 1), parts=("memory", "speed"), repeats=1, new_tokens=1
    )
    report = benchmark(str(models / "converted"), tmp_path / "out", "none", options, formats=("json",))
    assert [row.problem for row in report.memory] == ["out of memory", None]
    assert [row.problem for row in report.speed] == ["out of memory, as in the memory table", None]
    assert [row.batch_size for row in report.speed] == [10**9, 1]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.json"]
    assert report.baseline is None
    assert report.baseline_cache_numbers_per_token == 128
    assert [row.largest_batch > 0 for row in report.budget] == [True]


def test_a_killed_cell_counts_as_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    real = subprocess.run

    def killed(command: list[str], **options: Any) -> Any:
        return real([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], **options)

    monkeypatch.setattr(subprocess, "run", killed)
    with pytest.raises(CellError, match="out of memory: the system ended the process"):
        run_cell("memory", {})


def test_a_lack_of_memory_is_known_by_what_it_says(models: Path) -> None:
    with pytest.raises(RuntimeError) as torchs:
        torch.empty(2**60)
    wrapped = MLAError("model: the weights did not load")
    wrapped.__cause__ = torchs.value
    for error in (torchs.value, wrapped, MemoryError(), OSError(12, os.strerror(12)), torch.OutOfMemoryError()):
        assert ran_out_of_memory(error)
    for error in (RuntimeError("shapes do not match"), MLAError("no such file")):
        assert not ran_out_of_memory(error)


@pytest.mark.usefixtures("in_process")
def test_another_vocabulary_refuses_quality_alone(models: Path, tmp_path: Path) -> None:
    options = BenchmarkOptions(
        context_lengths=(16,),
        batch_sizes=(1,),
        eval_data=EVALUATION,
        eval_samples=1,
        eval_length=16,
        parts=("memory", "quality"),
        baselines=("source",),
    )
    report = benchmark(str(models / "converted"), tmp_path / "out", str(models / "small"), options, formats=("md",))
    assert [row.problem for row in report.memory] == [None, None]
    theirs, ours = report.quality
    assert theirs.problem == "refused: the baseline has a vocabulary of 512 tokens, the model of 4096"
    assert theirs.perplexity is None
    assert ours.perplexity > 1
    assert ours.kl_nats is None
    assert "refused: the baseline" in (tmp_path / "out" / "report.md").read_text()


def test_reports_are_compared(
    report: BenchmarkReport, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(report, model="another", interrupted=True)
    (tmp_path / "other").mkdir()
    other.write(tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    arguments = ["mla-benchmark", "--compare", str(models / "report"), str(tmp_path / "other")]
    monkeypatch.setattr(sys, "argv", ["optimum-cli", *arguments])
    main()
    text = (tmp_path / "mla_comparison" / "report.md").read_text()
    assert text.startswith("# 2 reports compared")
    assert "| report: model, hqq-int4 |" in text
    assert "| other: model, hqq-int4 |" in text
    assert "other: interrupted: the run was stopped" in text
    assert (tmp_path / "mla_comparison" / "report.html").is_file()
    with pytest.raises(OutputError, match="exists"):
        compare([models / "report", tmp_path / "other"], tmp_path / "mla_comparison")
    compare([models / "report", tmp_path / "other"], tmp_path / "mla_comparison", ("md",), overwrite=True)
    assert [path.name for path in (tmp_path / "mla_comparison").iterdir()] == ["report.md"]


def test_ctrl_c_keeps_what_was_measured(models: Path, tmp_path: Path) -> None:
    command = [
        *(PROGRAM, "mla-benchmark", "-m", str(models / "converted"), "--baseline", "none", "--parts", "memory"),
        *("--context-lengths", *map(str, range(8, 400, 8)), "--batch-sizes", "1", str(tmp_path / "out")),
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    cells_seen: set[int] = set()
    while len(cells_seen) < 3:  # the third begins when two are done
        cells_seen |= {child.pid for child in psutil.Process(process.pid).children()}
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "interrupted: OUTPUT holds what was measured before, if anything" in stderr
    report = BenchmarkReport.read(tmp_path / "out")
    assert report.interrupted
    assert 2 <= len(report.memory) < 49
    assert [row.context_tokens for row in report.memory] == [8 * (i + 1) for i in range(len(report.memory))]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


BAD_INPUT: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "no such cache": (r"cache: got 'int4'", {"caches": ("int4",)}, {}),
    "bits that a backend has not": (
        r"bits: got 3, allowed: 8, 4, 2 with the backend quanto",
        {"caches": ("quanto-int3",)},
        {},
    ),
    "no context": (r"context_lengths: got 0", {"context_lengths": (0,)}, {}),
    "no rows": (r"batch_sizes: got \[\]", {"batch_sizes": ()}, {}),
    "no steps": (r"new_tokens: got 0", {"new_tokens": 0}, {}),
    "unknown part": (r"parts: got 'taste'", {"parts": ("taste",)}, {}),
    "unknown format": (r"format: got 'pdf', allowed: json, md, html", {}, {"formats": ("pdf",)}),
    "no such model": (r"nowhere did not load", {}, {"model": "nowhere"}),
    "no such baseline": (r"nowhere did not load", {}, {"baseline": "nowhere"}),
    "a window beyond the model": (r"eval_length: got 4096", {"eval_data": EVALUATION, "eval_length": 4096}, {}),
    "a stride as long as the window": (
        r"stride: got 32",
        {"eval_data": EVALUATION, "eval_length": 32, "stride": 32},
        {},
    ),
    "no such text": (r"nowhere\.txt could not be read: .*No such file", {"eval_data": "nowhere.txt"}, {}),
    "no such device": (r"dtype: got 'int3'", {}, {"dtype": "int3"}),
    "a stride of nothing": (r"stride: got 0", {"eval_data": EVALUATION, "stride": 0}, {}),
    "windows of nothing": (r"eval_length: got 0", {"eval_data": EVALUATION, "eval_length": 0}, {}),
    "no documents": (r"tasks_limit: got 0", {"tasks_limit": 0}, {}),
    "no caches": (r"cache: got \[\]", {"caches": ()}, {}),
    "no such task": (r"tasks: got 'no_such_task'", {"tasks": ("no_such_task",)}, {}),
    "no such folder of tasks": (r"tasks_path: got 'nowhere'", {"tasks": ("one",), "tasks_path": "nowhere"}, {}),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused_before_any_work(case: str, models: Path, tmp_path: Path) -> None:
    message, options, arguments = BAD_INPUT[case]
    with pytest.raises(MLAError, match=message):
        benchmark(
            **{
                "model": str(models / "converted"),
                "output": tmp_path / "out",
                "options": BenchmarkOptions(**options),
                **arguments,
            }
        )
    assert list(tmp_path.iterdir()) == []


def test_a_quantized_cache_of_a_source_model_is_refused(models: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match=r"cache: got 'hqq-int4', .*not converted"):
        benchmark(str(models / "source"), tmp_path / "out", options=BenchmarkOptions(caches=("hqq-int4",)))


def test_comparisons_need_reports(report: BenchmarkReport, models: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match=r"compare: .*two folders or more"):
        compare([models / "report"], tmp_path / "out")
    with pytest.raises(ReportError, match=r"report: .*converted/report\.json .*No such file.*mla-benchmark wrote"):
        compare([models / "report", models / "converted"], tmp_path / "out")
    (tmp_path / "report.json").write_text('{"model": 1}')
    with pytest.raises(
        ReportError, match=r"report\.json is no report of mla-benchmark .*: the field model is 1, not a text"
    ):
        compare([models / "report", tmp_path], tmp_path / "out")


@pytest.mark.usefixtures("in_process")
def test_another_tokenizer_refuses_quality_alone(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "source", tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    content = json.loads(path.read_text())
    one, two, *_ = [word for word, number in content["model"]["vocab"].items() if number > 2000]
    vocabulary = content["model"]["vocab"]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    path.write_text(json.dumps(content))
    options = BenchmarkOptions(
        *((16,), (1,)),
        eval_data=EVALUATION,
        eval_samples=1,
        eval_length=16,
        parts=("memory", "quality"),
        baselines=("source",),
    )
    report = benchmark(str(models / "converted"), tmp_path / "out", str(tmp_path / "other"), options, formats=())
    assert [row.problem for row in report.memory] == [None, None]
    theirs, ours = report.quality
    assert theirs.problem == "refused: the baseline has another tokenizer"
    assert ours.problem is None
    assert ours.agreement_percent is None


@pytest.mark.usefixtures("in_process")
def test_a_quantized_model_is_measured_as_it_stores(models: Path, tmp_path: Path) -> None:
    """The settings in its config are its default cache, with room for tokens that come later."""
    settings = CacheSettings(bits=4, rope_bits=8, residual_length=0, group_size=16)
    quantize(str(models / "converted"), tmp_path / "quantized", settings)
    options = BenchmarkOptions(
        *((96,), (1, 3), ("default", "16bit", "hqq-int3", "quanto-int8", "quanto-int4")),
        eval_data=EVALUATION,
        eval_samples=2,
        eval_length=16,
        stride=8,
        parts=("memory", "quality"),
        baselines=("source",),
    )
    report = benchmark(str(tmp_path / "quantized"), tmp_path / "out", str(models / "source"), options, formats=())
    for row in report.memory:
        assert (row.problem, row.flags) == (None, [])
        if row.cache != "16bit":
            assert row.live_cache_bytes == row.predicted_cache_bytes
    single = {row.cache: row.live_cache_bytes for row in report.memory if row.role == "model" and row.batch_size == 1}
    # Two layers, 24 numbers of latent in two groups and a rotary key of 8: codes, scales, and shifts (quanto has
    # none for 8 bits).
    assert single["16bit"] >= 96 * 2 * 32 * 4
    assert single["default"] == 96 * 2 * (24 * 4 + 2 * 32 + 8 * 8 + 32) / 8
    assert single["quanto-int4"] == 96 * 2 * (24 * 4 + 2 * 32 + 8 * 8 + 16) / 8
    assert single["quanto-int8"] == 96 * 2 * (24 * 8 + 2 * 16 + 8 * 8 + 16) / 8
    # Ten numbers of 3 bits share a word: these 24 need three words, as they do with 4 bits.
    assert single["hqq-int3"] == single["default"]
    quality = {row.cache: row for row in report.quality if row.role == "model"}
    # Random weights are not made worse by rounding, but every cache rounds in its own way.
    assert len({row.kl_nats for row in quality.values()}) == len(quality) == 5


def test_interrupted_before_anything_was_measured_nothing_is_written(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(kind: str, request: dict[str, Any]) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    monkeypatch.setattr(run, "run_cell", stop)
    with pytest.raises(KeyboardInterrupt):
        benchmark(str(models / "converted"), tmp_path / "out", "none", BenchmarkOptions((8,), (1,)))
    assert list(tmp_path.iterdir()) == []


BAD_ARGUMENTS: dict[str, tuple[list[str], str]] = {
    "no model": (["OUT"], "error: --model is missing"),
    "no output": (["-m", "MODEL"], "error: OUTPUT is missing"),
    "no numbers": (["-m", "MODEL", "OUT", "--context-lengths", "8k", "16"], "error: context_lengths: got ['8k', '16']"),
    "no context": (["-m", "MODEL", "OUT", "--context-lengths", "0"], "error: context_lengths: got 0"),
    "no such cache": (["-m", "MODEL", "OUT", "--cache", "default,int4"], "error: cache: got 'int4'"),
    "no such bits": (["-m", "MODEL", "OUT", "--cache", "quanto-int3"], "error: bits: got 3"),
    "a cache of the source": (["-m", "SOURCE", "OUT", "--cache", "16bit"], "error: cache: got '16bit'"),
    "no such part": (["-m", "MODEL", "--parts", "taste", "memory", "OUT"], "error: parts: got 'taste'"),
    "no such format": (["-m", "MODEL", "--format", "md", "pdf", "OUT"], "error: format: got 'pdf'"),
    "no size": (["-m", "MODEL", "OUT", "--memory-budget", "much"], "error: memory_budget: got 'much'"),
    "an output that exists": (["-m", "MODEL", "SOURCE"], "error: output: "),
    "one report": (["--compare", "REPORT"], "error: compare: "),
    "a report twice": (["--compare", "REPORT", "REPORT"], "error: compare: "),
    "no report": (["--compare", "REPORT", "MODEL"], "error: report: "),
    "a comparison over its report": (["REPORT", "--overwrite", "--compare", "REPORT", "OTHER"], "error: output: "),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_one_line(
    case: str,
    report: BenchmarkReport,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (models / "other").mkdir(exist_ok=True)
    report.write(models / "other")
    named = {name.upper(): str(models / name) for name in ("source", "report", "other")}
    named |= {"MODEL": str(models / "converted"), "OUT": str(tmp_path / "out")}
    words, message = BAD_ARGUMENTS[case]
    monkeypatch.setattr(sys, "argv", ["optimum-cli", "mla-benchmark", *(named.get(word, word) for word in words)])
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in models.rglob("*")}
    with pytest.raises(SystemExit) as exit_:
        main()
    printed = capsys.readouterr()
    assert (exit_.value.code, printed.out) == (2, "")
    (line,) = [line for line in printed.err.splitlines() if "optimum.quanto.subpackage" not in line]
    assert line.startswith(message)
    assert list(tmp_path.iterdir()) == []
    assert {path: path.stat().st_mtime_ns for path in models.rglob("*")} == before


@pytest.mark.usefixtures("in_process")
def test_the_output_may_stand_after_an_option_of_several_words(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["optimum-cli", "mla-benchmark", "-m", str(models / "converted"), "--baseline", "none"]
    start += ["--context-lengths", "8", "--batch-sizes", "1", "--cache", "default, 16bit,default"]
    for name, end in (("a", ["--format", "md", "--parts", "memory"]), ("b", ["--parts", "memory", "--format", "md"])):
        monkeypatch.setattr(sys, "argv", [*start, *end, str(tmp_path / name)])
        main()
        assert [row.cache for row in BenchmarkReport.read(tmp_path / name).memory] == ["default", "16bit"]
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["report.json", "report.md"]
        assert f"Saved to {tmp_path / name}" in capsys.readouterr().out
