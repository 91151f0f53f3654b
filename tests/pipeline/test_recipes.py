"""Recipes: what they may say, which steps are done, and the command that runs them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer

from optimum.commands.mla.main import main
from optimum.commands.mla.run import STEPS as COMMANDS
from optimum.commands.mla.run import StepParser, parsed
from optimum_mla.convert import Run
from optimum_mla.core.errors import InvalidValueError, MLAError, OptionError, OutputError
from optimum_mla.io.claim import hold_claim
from optimum_mla.io.faults import check_json
from optimum_mla.io.folder import kept_folder
from optimum_mla.pipeline.recipes import INPUTS, JOURNAL, RunRecord, Start, Step, read_recipe
from optimum_mla.report.schema import ConversionReport, QuantizationReport, RecoveryReport
from tests.cases import source_model

REFERENCE = Path(__file__).resolve().parents[2] / "benchmarks" / "reference_model"
STEPS = [
    {"mla-convert": {"model": "m", "kv_cache_ratio": 0.25, "heal": False, "shared-rope": True}},
    {"quantize": {"cache-bits": 4}},
    "mla-benchmark",
    {"mla-export": {"pad": None}},
]


def written(tmp_path: Path, content: object) -> Path:
    """A recipe file with this content."""
    path = tmp_path / "recipe.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return path


def test_steps_follow_each_other(tmp_path: Path) -> None:
    folder, steps = read_recipe(written(tmp_path, {"output": "out", "steps": STEPS}))
    assert folder == Path("out")
    assert [step.command for step in steps] == ["mla-convert", "mla-quantize", "mla-benchmark", "mla-export"]
    assert [str(step.output) for step in steps] == [
        "out/1-convert",
        "out/2-quantize",
        "out/3-benchmark",
        "out/4-export",
    ]
    # A benchmark makes no model, so the export takes the model that the benchmark measured.
    assert [step.model for step in steps] == ["m", "out/1-convert", "out/2-quantize", "out/2-quantize"]
    assert steps[3].options == {}
    elsewhere, _ = read_recipe(written(tmp_path, {"steps": STEPS}), "other")
    assert elsewhere == Path("other")


def step_with(options: dict[str, object], command: str = "mla-finetune") -> Step:
    return Step(command, options, "m", Path("out"))


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (
            step_with({"kv-cache-ratio": 0.25, "heal": False, "shared-rope": True}, "mla-convert"),
            {"kv_cache_ratio": 0.25, "heal": False, "shared_rope": True},
        ),
        # These switches have no opposite, so false leaves them as they are without a recipe.
        (step_with({"uncalibrated": False, "shared-rope": False}, "mla-convert"), {"uncalibrated": False}),
        (step_with({"merge": False, "bf16": False, "train-data": "t"}), {"merge": None, "bf16": None}),
        (step_with({"merge": True, "training": ["a=1", "b=2"]}), {"merge": True, "training": ["a=1", "b=2"]}),
        (step_with({"pad": False}, "mla-export"), {"pad": False}),
    ],
    ids=str,
)
def test_the_options_of_a_step_are_those_of_its_command(step: Step, expected: dict[str, object]) -> None:
    found = vars(parsed(step, 1))
    assert {**found, **expected, "model": "m", "output": "out", "overwrite": True} == found


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mergee": False}, "unrecognized arguments: --mergee"),
        ({"teacher": False}, "argument --teacher: expected one argument"),
        ({"lora-rank": True}, "argument --lora-rank/--lora_rank: expected one argument"),
    ],
)
def test_what_no_command_takes_is_said(options: dict[str, object], words: str) -> None:
    with pytest.raises(OptionError, match=f"step 2 .mla-finetune.: {words}"):
        parsed(step_with(options), 2)


def test_no_option_that_names_something_to_read_is_forgotten() -> None:
    found = set()
    for command in COMMANDS.values():
        parser = StepParser()
        command.parse_args(parser)
        found |= {
            action.option_strings[0].lstrip("-")
            for action in parser._actions
            if action.option_strings and action.metavar in ("TEXT", "FOLDER", "FILE", "MODEL")
        }
    # The cache holds downloads only. The teacher has the metavar of all names.
    assert found - {"cache-dir"} | {"teacher"} == set(INPUTS)


def begun(steps: list[Step], overwrite: bool = False) -> list[str]:
    """Which of the steps are to run, when the run is taken up and all of them go well."""
    record, ran = RunRecord(steps[0].output.parent, overwrite), []
    for step in steps:
        if record.begin(step) is not None:
            ran.append(step.output.name)
            step.output.mkdir(exist_ok=True)
            record.end(step)
    return ran


def test_a_change_makes_its_step_and_all_later_ones_pending(tmp_path: Path) -> None:
    content = {"output": str(tmp_path / "run"), "steps": json.loads(json.dumps(STEPS))}
    _, steps = read_recipe(written(tmp_path, content))
    assert begun(steps[:3]) == ["1-convert", "2-quantize", "3-benchmark"]
    assert begun(steps) == ["4-export"]
    content["steps"][1]["quantize"]["cache-bits"] = 8
    _, changed = read_recipe(written(tmp_path, content))
    record = RunRecord(tmp_path / "run")
    assert record.begin(changed[0]) is None
    assert record.begin(changed[1]) == Start(False, ", done again: its options, model or text have changed")
    assert begun(changed) == ["2-quantize", "3-benchmark", "4-export"]
    steps[0].output.rmdir()
    assert begun(changed) == ["1-convert", "2-quantize", "3-benchmark", "4-export"]


@pytest.mark.parametrize("change", ["model", "text", "text in a list", "text of a config", "result"])
def test_other_content_under_the_same_name_makes_its_step_pending(change: str, tmp_path: Path) -> None:
    model, text, config = tmp_path / "model", tmp_path / "text.txt", tmp_path / "training.yaml"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"0123")
    text.write_text("words")
    config.write_text(yaml.safe_dump({"train_data": str(text)}))
    named = {
        "text": {"train-data": str(text)},
        "text in a list": {"train-data": [str(text)]},
        "text of a config": {"config": str(config)},
    }
    recipe = {
        "output": str(tmp_path / "run"),
        "steps": [{"mla-convert": {"model": str(model)}}, {"mla-finetune": named.get(change, {})}, "mla-benchmark"],
    }
    _, steps = read_recipe(written(tmp_path, recipe))
    assert begun(steps) == ["1-convert", "2-finetune", "3-benchmark"]
    (steps[0].output / "README.md").write_text("A note.")
    assert begun(steps) == []
    changed = {"model": model / "model.safetensors", "result": steps[1].output / "config.json"}.get(change, text)
    changed.write_bytes(b"4567")
    os.utime(changed, ns=(1, 1))  # It is of the same size, and older.
    done_before = {"model": 0, "result": 2}.get(change, 1)
    assert begun(steps) == ["1-convert", "2-finetune", "3-benchmark"][done_before:]
    assert begun(steps) == []


def test_an_interrupted_step_goes_on_only_if_it_is_the_same(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("words")
    steps = [{"mla-convert": {"model": "m"}}, {"mla-finetune": {"train-data": str(text)}}]
    content = {"output": str(tmp_path / "run"), "steps": steps}
    _, steps = read_recipe(written(tmp_path, content))
    goes_on = Start(True, ", going on with what was kept of it")

    def start(overwrite: bool = False) -> Start | None:
        record = RunRecord(tmp_path / "run", overwrite)
        assert record.begin(steps[0]) is None
        return record.begin(steps[1])

    assert begun(steps[:1]) == ["1-convert"]
    assert start() == Start(False)
    kept_folder("mla-finetune", steps[1].output).mkdir()  # It is interrupted.
    assert start() == goes_on
    assert start() == goes_on
    assert start(overwrite=True).remark.startswith(", begun anew, without what was kept of it: as --overwrite asks")
    assert start() == goes_on
    text.write_text("other words")
    anew = Start(False, ", begun anew, without what was kept of it: its options, model or text have changed")
    assert start() == anew
    assert start() == goes_on  # The command refuses it if it had not got to its own checks before.


@pytest.mark.parametrize(
    ("line", "known"),
    [
        (0, []),  # all of it
        (3, [None, Start(False)]),  # "done" of the second step, of which the line before says what it was begun with
        (4, [None, None]),  # "begun" of the third
    ],
)
def test_damage_of_the_record_is_said_and_nothing_unknown_is_replaced(
    line: int, known: list[Start | None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = {"output": str(tmp_path / "run"), "steps": json.loads(json.dumps(STEPS))}
    _, steps = read_recipe(written(tmp_path, content))
    begun(steps)
    path = tmp_path / "run" / JOURNAL
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:line], b"\0" * 20 + b"\n", *lines[line + 1 :]]))
    record = RunRecord(tmp_path / "run")
    assert [record.begin(step) for step in steps[: len(known)]] == known
    unknown = steps[len(known)]
    with pytest.raises(OutputError, match=rf"{unknown.output} is there, but {path} does not say what made it\. Move"):
        record.begin(unknown)
    (said,) = caplog.messages
    assert said.startswith(f"warning: {path} is damaged from line {line + 1} on.")
    assert begun(steps, overwrite=True) == [step.output.name for step in steps[sum(one is None for one in known) :]]
    assert begun(steps) == []


def test_what_an_unknown_run_kept_is_left_to_the_command(tmp_path: Path) -> None:
    _, steps = read_recipe(written(tmp_path, {"output": str(tmp_path / "run"), "steps": STEPS[:1]}))
    RunRecord(tmp_path / "run").begin(steps[0])
    kept_folder("mla-convert", steps[0].output).mkdir()
    (tmp_path / "run" / JOURNAL).write_bytes(b"\0" * 100)
    assert RunRecord(tmp_path / "run").begin(steps[0]) == Start(True, ", going on with what was kept of it")


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        ("steps: [", OptionError, "is not YAML"),
        ("- 1", OptionError, "has no list of steps"),
        ({"output": "o", "steps": []}, OptionError, "has no list of steps"),
        ({"output": "o", "steps": STEPS, "stages": 1}, OptionError, "has the field stages"),
        ({"steps": STEPS}, OptionError, "names no output folder"),
        ({"output": "o", "steps": ["mla-quantize"]}, OptionError, "names no model"),
        (
            {"output": "o", "steps": [{"mla-bake": {}}]},
            InvalidValueError,
            "step 1: got 'mla-bake', allowed: mla-convert",
        ),
        ({"output": "o", "steps": [{"mla-convert": 3}]}, OptionError, "no mapping"),
        ({"output": "o", "steps": [{"mla-convert": {}, "mla-export": {}}]}, OptionError, "one command"),
        ({"output": "o", "steps": [{"mla-convert": {"model": "m", "output": "x"}}]}, OptionError, "names an output"),
    ],
)
def test_a_recipe_that_says_nothing_possible_is_one_line(
    content: object, error: type[MLAError], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words) as caught:
        read_recipe(written(tmp_path, content))
    assert "\n" not in str(caught.value)


def test_a_folder_with_other_things_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="holds no run"):
        RunRecord(tmp_path)
    with pytest.raises(OptionError, match="could not be read"):
        read_recipe(tmp_path / "missing.yaml")


def test_two_processes_do_not_run_into_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = written(tmp_path, {"output": str(tmp_path / "run"), "steps": STEPS})
    with hold_claim(tmp_path / "run"), pytest.raises(SystemExit, match="2"):
        main(["run", str(recipe)])
    assert f"output: another process is writing {tmp_path / 'run'}." in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def run(recipe: Path) -> subprocess.CompletedProcess[str]:
    """`optimum-mla run` in a process of its own."""
    program = str(Path(sys.executable).with_name("optimum-mla"))
    return subprocess.run([program, "run", str(recipe)], capture_output=True, text=True, check=False)


def test_the_command_runs_a_recipe_and_goes_on_where_it_changed(tmp_path: Path) -> None:
    output = tmp_path / "run"
    convert = {
        "model": str(REFERENCE),
        "method": "x-ecomla",
        "uncalibrated": True,
        "eval-samples": 1,
        "eval-length": 16,
    }
    content = {"output": str(output), "steps": [{"mla-convert": convert}, {"mla-quantize": {"cache-bits": 4}}]}
    done = run(written(tmp_path, content))
    assert done.returncode == 0, done.stderr
    # No other plugin is loaded, so none complains; a slow machine is told how far the conversion is.
    assert all(line.startswith("x-ecomla: ") for line in done.stderr.splitlines())
    assert f"step 1 of 2: mla-convert -> {output / '1-convert'}" in done.stdout
    assert QuantizationReport.read(output / "2-quantize").cache["bits"] == 4
    first = ConversionReport.read(output / "1-convert")
    content["steps"][1]["mla-quantize"]["cache-bits"] = 8
    done = run(written(tmp_path, content))
    assert done.returncode == 0, done.stderr
    assert f"step 1 of 2: mla-convert: done before, {output / '1-convert'} is kept" in done.stdout
    assert QuantizationReport.read(output / "2-quantize").cache["bits"] == 8
    assert ConversionReport.read(output / "1-convert") == first


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cache-bitz": 4}, r"step 2 \(mla-quantize\): unrecognized arguments: --cache-bitz 4"),
        pytest.param(
            {"cache-bits": "four"},
            r"step 2 \(mla-quantize\): argument --cache-bits: invalid int value: 'four'",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_later_step_is_checked_before_the_first_runs(options: dict[str, object], words: str, tmp_path: Path) -> None:
    content = {"output": str(tmp_path / "run"), "steps": [{"mla-convert": {"model": "m"}}, {"mla-quantize": options}]}
    done = run(written(tmp_path, content))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert re.search(words, line), line
    assert not (tmp_path / "run").exists()


def run_until(recipe: Path, reached: Callable[[], bool], number: int) -> tuple[int, str]:
    """Run a recipe in a process that gets a signal once something is reached; return its status and what it printed."""
    log = recipe.with_suffix(".log")
    child = os.fork()
    if child == 0:
        with log.open("w") as file:
            sys.stdout = sys.stderr = file
            try:
                main(["run", str(recipe)])
            except SystemExit as end:
                file.flush()
                os._exit(int(end.code))
            except BaseException:
                traceback.print_exc()
            file.flush()
            os._exit(99)
    while os.waitpid(child, os.WNOHANG) == (0, 0) and not reached():
        time.sleep(0.002)
    os.kill(child, number)
    _, status = os.waitpid(child, 0)
    return status, log.read_text()


def test_an_interrupted_run_goes_on_with_what_it_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source_model("llama", vocab_size=4096).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(REFERENCE).save_pretrained(tmp_path / "model")
    convert = {
        "model": str(tmp_path / "model"),
        "kv-cache-ratio": 0.5,
        "calibration-data": str(REFERENCE / "calibration.txt"),
        "calibration-samples": 4,
        "calibration-length": 32,
    }
    train = {
        "train-data": str(tmp_path / "text.txt"),
        "train-tokens": 600,
        "sequence-length": 32,
        "lora-rank": 4,
        "max-steps": 12,
        "save-steps": 2,
        "per-device-train-batch-size": 1,
        "merge": False,
    }
    words = (REFERENCE / "evaluation.txt").read_text(encoding="utf-8")
    (tmp_path / "text.txt").write_text(words[:20000], encoding="utf-8")
    recipe = written(
        tmp_path, {"output": str(tmp_path / "run"), "steps": [{"mla-convert": convert}, {"mla-finetune": train}]}
    )
    main(["run", str(recipe), str(tmp_path / "whole")])
    capsys.readouterr()

    run = tmp_path / "run"
    layers = run / ".1-convert.unfinished" / "journal.jsonl"
    checkpoint = run / ".2-finetune.training" / "distill" / "checkpoint-4" / "trainer_state.json"

    def is_written() -> bool:
        # The file stands before it is written in full, and a checkpoint without the whole of it does not count.
        return checkpoint.is_file() and check_json(checkpoint) is None

    status, said = run_until(recipe, lambda: layers.is_file() and '"layer 0"' in layers.read_text(), signal.SIGINT)
    assert os.waitstatus_to_exitcode(status) == 130, said
    assert "interrupted: the steps that were done are kept; run the recipe again to go on" in said
    assert "Traceback" not in said
    kept = sum('"key": "layer ' in line for line in layers.read_text().splitlines())
    assert kept >= 1

    built, build = tmp_path / "built", Run._build

    def noting(self: Run, layer: int, *rest: Any) -> Any:
        with built.open("a") as file:
            file.write(f"{layer}\n")
        return build(self, layer, *rest)

    built.touch()
    monkeypatch.setattr(Run, "_build", noting)
    status, said = run_until(recipe, is_written, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, said
    assert f"step 1 of 2: mla-convert -> {run / '1-convert'}, going on with what was kept of it" in said
    assert f"step 2 of 2: mla-finetune -> {run / '2-finetune'}\n" in said
    assert [int(line) for line in built.read_text().split()] == list(range(kept, 3))

    main(["run", str(recipe)])
    said = capsys.readouterr().out
    assert f"step 1 of 2: mla-convert: done before, {run / '1-convert'} is kept" in said
    assert f"step 2 of 2: mla-finetune -> {run / '2-finetune'}, going on with what was kept of it" in said
    assert int(RecoveryReport.read(run / "2-finetune").resumed_at_step or 0) >= 4
    for part in ("1-convert/model.safetensors", "2-finetune/adapter_model.safetensors"):
        found, expected = (load_file(folder / part) for folder in (run, tmp_path / "whole"))
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.allclose(found[name], tensor, rtol=0, atol=1e-6), name
    assert sorted(path.name for path in run.iterdir()) == ["1-convert", "2-finetune", "run.jsonl"]

    # Other words under the same name: the training is another one, so nothing is kept but what was done before it.
    (tmp_path / "text.txt").write_text(words[20000:40000], encoding="utf-8")
    status, said = run_until(recipe, checkpoint.is_file, signal.SIGINT)
    assert os.waitstatus_to_exitcode(status) == 130, said
    assert f"{run / '2-finetune'}, done again: its options, model or text have changed" in said
    (tmp_path / "text.txt").write_text(words[40000:60000], encoding="utf-8")
    main(["run", str(recipe)])
    said = capsys.readouterr().out
    assert f"{run / '2-finetune'}, begun anew, without what was kept of it: its options, model or text have" in said
    assert RecoveryReport.read(run / "2-finetune").resumed_at_step is None
