"""Recipes: what they may say, which steps are done, and the command that runs them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from optimum_mla.core.errors import InvalidValueError, MLAError, OptionError, OutputError
from optimum_mla.pipeline.recipes import Journal, pending, read_recipe
from optimum_mla.report.schema import ConversionReport, QuantizationReport

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
    assert steps[0].words() == [
        *("-m", "m", "out/1-convert", "--overwrite", "--kv-cache-ratio", "0.25", "--no-heal", "--shared-rope")
    ]
    assert steps[3].options == {}
    elsewhere, _ = read_recipe(written(tmp_path, {"steps": STEPS}), "other")
    assert elsewhere == Path("other")


def test_a_change_makes_its_step_and_all_later_ones_pending(tmp_path: Path) -> None:
    output = tmp_path / "run"
    content = {"output": str(output), "steps": json.loads(json.dumps(STEPS))}
    _, steps = read_recipe(written(tmp_path, content))
    journal = Journal(output)
    assert pending(journal, steps) == steps
    for step in steps[:3]:
        step.output.mkdir()
        journal.note(step)
    assert pending(Journal(output), steps) == steps[3:]
    content["steps"][1]["quantize"]["cache-bits"] = 8
    _, changed = read_recipe(written(tmp_path, content))
    assert pending(Journal(output), changed) == changed[1:]
    steps[0].output.rmdir()
    assert pending(Journal(output), steps) == steps


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
        Journal(tmp_path)
    with pytest.raises(OptionError, match="could not be read"):
        read_recipe(tmp_path / "missing.yaml")


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
