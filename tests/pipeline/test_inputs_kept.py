"""No command deletes what it reads, not even with `--overwrite`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from optimum_mla.core.errors import OutputError
from optimum_mla.pipeline import BenchmarkOptions, TextOptions, benchmark, compare, convert, export, finetune, quantize
from optimum_mla.recovery.recipe import Recipe
from tests.cases import UNCALIBRATED, source_model

REFERENCE = Path(__file__).resolve().parents[2] / "benchmarks" / "reference_model"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make `source`, `converted` from it, and in `converted` a `text.txt`, a `report.json` and a model in `deep`."""
    folder = tmp_path_factory.mktemp("models")
    source_model("llama", vocab_size=4096).save_pretrained(folder / "source")
    AutoTokenizer.from_pretrained(REFERENCE).save_pretrained(folder / "source")
    convert(str(folder / "source"), folder / "converted", "x-ecomla", {"kv_cache_ratio": 0.5}, UNCALIBRATED)
    (folder / "converted" / "text.txt").write_text("To be kept. " * 500)
    (folder / "converted" / "report.json").write_text("{}")
    (folder / "converted" / "report").mkdir()
    (folder / "converted" / "report" / "report.json").write_text("{}")
    shutil.copytree(folder / "source", folder / "converted" / "deep")
    checkpoint = folder / ".trained.training" / "checkpoint-1"
    shutil.copytree(folder / "converted", checkpoint)
    return folder


def text(folder: Path) -> TextOptions:
    return TextOptions(eval_data=str(folder / "converted" / "text.txt"), eval_samples=1, eval_length=16)


CASES: dict[str, Callable[[Path, Path], Any]] = {
    "convert: model": lambda made, out: convert(str(made / "converted" / "deep"), out, overwrite=True),
    "convert: evaluation text": lambda made, out: convert(str(made / "source"), out, texts=text(made), overwrite=True),
    "convert: calibration text": lambda made, out: convert(
        str(made / "source"), out, texts=TextOptions(str(made / "converted" / "text.txt")), overwrite=True
    ),
    "quantize: model": lambda made, out: quantize(str(out), out, overwrite=True),
    "quantize: text": lambda made, out: quantize(
        str(made / ".trained.training" / "checkpoint-1"), out, texts=text(made), overwrite=True
    ),
    "export: model": lambda made, out: export(str(out), f"{out}/../converted", overwrite=True),
    "finetune: model": lambda made, out: finetune(str(out), out, str(made / "source"), overwrite=True),
    "finetune: training text": lambda made, out: finetune(
        str(made / ".trained.training" / "checkpoint-1"), out, str(out / "text.txt"), overwrite=True
    ),
    "finetune: teacher": lambda made, out: finetune(
        str(made / ".trained.training" / "checkpoint-1"),
        out,
        "nowhere.txt",
        Recipe(teacher=str(out / "deep")),
        overwrite=True,
    ),
    "finetune: the source, which teaches": lambda made, out: finetune(
        str(made / "converted"), made / "source", "nowhere.txt", overwrite=True
    ),
    "finetune: a checkpoint of the run before": lambda made, out: finetune(
        str(made / ".trained.training" / "checkpoint-1"), made / "trained", "nowhere.txt", overwrite=True
    ),
    "benchmark: model": lambda made, out: benchmark(str(out / "deep"), out, overwrite=True),
    "benchmark: baseline": lambda made, out: benchmark(
        str(made / "source"), out, baseline=str(out / "deep"), overwrite=True
    ),
    "benchmark: text": lambda made, out: benchmark(
        str(made / "source"), out, options=BenchmarkOptions(eval_data=str(out / "text.txt")), overwrite=True
    ),
    "compare: report": lambda made, out: compare([out / "report", made / "source"], out, overwrite=True),
}


@pytest.mark.parametrize("case", CASES)
def test_an_input_is_not_deleted(case: str, made: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*") if path.is_file()}
    with pytest.raises(OutputError, match=r"^output: .*\b(is|holds) the input "):
        CASES[case](made, made / "converted")
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*") if path.is_file()} == before
