"""Teachers and baselines that the commands find by themselves are the models that were converted, or are refused."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from optimum_mla.calibrate.text import token_windows
from optimum_mla.core.errors import InvalidValueError
from optimum_mla.measure.quality import perplexity
from optimum_mla.pipeline import BenchmarkOptions, TextOptions, benchmark, convert, finetune
from optimum_mla.recovery.recipe import Recipe
from optimum_mla.report.schema import ConversionReport, RecoveryReport
from tests.cases import UNCALIBRATED, source_model

REFERENCE = Path(__file__).resolve().parents[2] / "benchmarks" / "reference_model"
TEXTS = TextOptions(eval_data=str(REFERENCE / "evaluation.txt"), eval_samples=1, eval_length=16)
NOTHING = BenchmarkOptions(parts=())
"""Nothing is measured: the report tells what the config of the baseline says."""
COMMITS = {"main": 40 * "1", "other": 40 * "2"}


def save_source(folder: Path, **changes: Any) -> None:
    source_model("llama", vocab_size=4096, **changes).save_pretrained(folder)
    AutoTokenizer.from_pretrained(REFERENCE).save_pretrained(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make `source`, `converted` from it by its relative name, and `elsewhere/source`, which is another model."""
    folder = tmp_path_factory.mktemp("models")
    save_source(folder / "source")
    save_source(folder / "elsewhere" / "source", num_hidden_layers=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        convert("source", "converted", "x-ecomla", {"kv_cache_ratio": 0.5}, UNCALIBRATED)
    return folder


@pytest.fixture
def moved(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with copies of `source` and `converted`; the report names the copy. `elsewhere` is present."""
    for name in ("source", "converted"):
        shutil.copytree(made / name, tmp_path / name)
    change_report(tmp_path / "converted", source_folder=str(tmp_path / "source"))
    monkeypatch.chdir(made / "elsewhere")
    return tmp_path


def change_report(folder: Path, **values: Any) -> None:
    """Change fields of the report of a conversion."""
    path = folder / "conversion_report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def train(
    model: Path | str, output: Path, recipe: dict[str, Any] | None = None, texts: TextOptions = TEXTS, **options: Any
) -> RecoveryReport:
    """Return the report of a training of one step."""
    training = {"max_steps": 1, "per_device_train_batch_size": 1}
    chosen = Recipe(**{"sequence_length": 16, "lora_rank": 2, **(recipe or {})})
    report = finetune(str(model), output, str(REFERENCE / "calibration.txt"), chosen, training, texts, **options)
    assert report is not None
    return report


def source_perplexity(folder: Path) -> float:
    """Return the perplexity of a model on the evaluation text."""
    windows = token_windows(AutoTokenizer.from_pretrained(REFERENCE), TEXTS.eval_data, 16, 1, "eval-data")
    return perplexity(AutoModelForCausalLM.from_pretrained(folder), windows)


def cached_numbers(folder: Path) -> int:
    """Return how many numbers a model caches per token, by its config."""
    config = AutoConfig.from_pretrained(folder)
    return config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim


def test_the_report_keeps_the_absolute_folder_and_the_card_the_short_name(made: Path) -> None:
    report = ConversionReport.read(made / "converted")
    assert report.model == "source"
    assert report.source_folder == str((made / "source").resolve())
    assert report.source_config_sha256 == hashlib.sha256((made / "source" / "config.json").read_bytes()).hexdigest()
    assert report.source_revision is None
    card = (made / "converted" / "README.md").read_text()
    assert "`source`" in card
    assert str(made) not in card


def test_a_folder_of_the_same_name_elsewhere_is_no_teacher(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made / "elsewhere")
    report = train(made / "converted", tmp_path / "out", {"stage1": "layerwise"})
    # The model of the same name here has one layer, which the layerwise stage refuses.
    assert report.teacher == "source"
    assert report.perplexity_source == pytest.approx(source_perplexity(made / "source"), rel=1e-5)
    assert str(made) not in (tmp_path / "out" / "README.md").read_text().partition("## Recovered")[2].replace(
        str(made / "converted"), ""
    )


def test_a_folder_of_the_same_name_elsewhere_is_no_baseline(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made / "elsewhere")
    report = benchmark(str(made / "converted"), tmp_path / "out", None, NOTHING, formats=("json",), device="cpu")
    assert report.baseline == "source"
    assert report.baseline_cache_numbers_per_token == cached_numbers(made / "source")
    assert report.baseline_cache_numbers_per_token != cached_numbers(made / "elsewhere" / "source")


Change = Callable[[Path], Any]
CHANGES: dict[str, tuple[str, Change]] = {
    "another config": (
        r"the config in .*source is not the one of the model that was converted",
        lambda folder: (folder / "source" / "config.json").write_text(
            (folder / "source" / "config.json").read_text().replace("}", "} ")
        ),
    ),
    "an old report with a relative name": (
        r"the report does not say that the folder source here is this model",
        lambda folder: change_report(folder / "converted", source_folder=None, source_config_sha256=None),
    ),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_what_is_not_known_to_be_the_source_is_refused(change: str, moved: Path) -> None:
    words, make = CHANGES[change]
    make(moved)
    with pytest.raises(InvalidValueError, match=rf"^teacher: got 'source', .*{words}\. .*--teacher\.$"):
        train(moved / "converted", moved / "out")
    with pytest.raises(InvalidValueError, match=rf"^baseline: got 'source', .*{words}\. .*--baseline none\.$"):
        benchmark(str(moved / "converted"), moved / "out", options=NOTHING)
    assert not (moved / "out").exists()


@pytest.mark.parametrize("change", [*CHANGES, "no folder", "no weights"])
def test_a_source_that_cannot_be_measured_is_told_in_one_line(
    change: str, moved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words, make = {
        **CHANGES,
        "no folder": (r"the folder .*source is not there any more", lambda folder: shutil.rmtree(folder / "source")),
        "no weights": (r"the weights of", lambda folder: (folder / "source" / "model.safetensors").unlink()),
    }[change]
    make(moved)
    with caplog.at_level(logging.WARNING, "optimum_mla"):
        report = train(moved / "converted", moved / "out", {"objective": "sft"})
    assert report.perplexity_source is None
    assert report.perplexity_converted is not None
    (line,) = [record.getMessage() for record in caplog.records if "perplexity of the source" in record.getMessage()]
    assert re.search(words, line)


def test_a_source_that_is_gone_is_no_teacher_and_no_baseline(moved: Path) -> None:
    shutil.rmtree(moved / "source")
    with pytest.raises(InvalidValueError, match=r"^teacher: .*source is not there any more\. "):
        train(moved / "converted", moved / "out")
    report = benchmark(str(moved / "converted"), moved / "out", options=NOTHING, formats=("json",), device="cpu")
    assert report.baseline is None


# The hub


@pytest.fixture(scope="module")
def hub(made: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Make a folder of downloads. The branch of `owner/converted` is `other` alone; `owner/source` has both."""
    folder = tmp_path_factory.mktemp("hub")
    for name, branches in (("source", COMMITS), ("converted", {"other": COMMITS["other"]})):
        place = folder / f"models--owner--{name}"
        (place / "refs").mkdir(parents=True)
        for branch, commit in branches.items():
            (place / "refs" / branch).write_text(commit)
            origin = made / ("elsewhere/source" if (name, branch) == ("source", "other") else name)
            shutil.copytree(origin, place / "snapshots" / commit)
    return str(folder)


def test_the_revision_is_that_of_the_model_alone(hub: str, tmp_path: Path, made: Path) -> None:
    options = {"cache_dir": hub, "revision": "other"}
    call: dict[str, Any] = {"texts": TextOptions(), "hub": options}
    # The layerwise stage needs a teacher of as many layers as the student has, as `main` is and `other` is not.
    recipe = {"teacher": "owner/source", "stage1": "layerwise"}
    assert train("owner/converted", tmp_path / "out", recipe, **call).teacher == "owner/source"
    with pytest.raises(InvalidValueError, match="num_hidden_layers"):
        train("owner/converted", tmp_path / "second", recipe, teacher_revision="other", **call)

    for revision, expected in ((None, made / "source"), ("other", made / "elsewhere" / "source")):
        report = benchmark(
            *("owner/converted", tmp_path / "report", "owner/source", NOTHING),
            **{"formats": ("json",), "device": "cpu", "overwrite": True, "hub": options, "baseline_revision": revision},
        )
        assert report.baseline_cache_numbers_per_token == cached_numbers(expected)


def test_the_source_of_a_hub_id_is_the_commit_that_was_converted(hub: str, tmp_path: Path, made: Path) -> None:
    options = {"cache_dir": hub, "revision": "other"}
    report = convert(
        "owner/source", tmp_path / "converted", "x-ecomla", {"kv_cache_ratio": 0.5}, UNCALIBRATED, hub=options
    )
    assert (report.model, report.source_revision) == ("owner/source", COMMITS["other"])
    assert report.source_folder is report.source_config_sha256 is None
    trained = train(tmp_path / "converted", tmp_path / "out", hub={"cache_dir": hub})
    assert trained.perplexity_source == pytest.approx(source_perplexity(made / "elsewhere" / "source"), rel=1e-5)


def test_a_revision_that_nothing_can_use_is_refused(made: Path, tmp_path: Path) -> None:
    model, source = str(made / "converted"), str(made / "source")
    with pytest.raises(InvalidValueError, match="teacher_revision: got 'v1', allowed: None, as sft has no teacher"):
        train(model, tmp_path / "out", {"objective": "sft"}, teacher_revision="v1")
    with pytest.raises(InvalidValueError, match=r"teacher_revision: got 'v1', allowed: None, as .*source is a folder"):
        train(model, tmp_path / "out", {"teacher": source}, teacher_revision="v1")
    with pytest.raises(InvalidValueError, match=r"baseline_revision: got 'v1', allowed: None, as .*source is a folder"):
        benchmark(model, tmp_path / "out", source, NOTHING, baseline_revision="v1")
    with pytest.raises(InvalidValueError, match="baseline_revision: got 'v1', allowed: None without a baseline"):
        benchmark(model, tmp_path / "out", "none", NOTHING, baseline_revision="v1")


def test_a_recorded_hub_id_that_is_a_folder_here_is_refused(
    made: Path, hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(
        "owner/source",
        tmp_path / "converted",
        "x-ecomla",
        {"kv_cache_ratio": 0.5},
        UNCALIBRATED,
        hub={"cache_dir": hub},
    )
    shutil.copytree(made / "elsewhere" / "source", tmp_path / "owner" / "source")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidValueError, match="the report does not say that the folder owner/source here is this"):
        train("converted", tmp_path / "out", hub={"cache_dir": hub})
