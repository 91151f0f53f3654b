"""Report files of other versions and of other programs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimum_mla.core.errors import ReportError
from optimum_mla.pipeline import benchmark, compare, convert, finetune, inspect
from optimum_mla.report.rows import BenchmarkReport, MemoryRow
from optimum_mla.report.schema import ConversionReport, LayerReport, Report, SourceReport
from tests.cases import UNCALIBRATED, source_model

PROGRAM = str(Path(sys.executable).with_name("optimum-mla"))
LAYER = LayerReport(
    layer=0, attention_form="decoupled", kv_lora_rank=8, k_lora_rank=8, v_lora_rank=8, qk_rope_head_dim=4,
    num_rope_heads=1, cache_numbers_per_token=12, output_error=0.5,
)  # fmt: skip
CONVERSION = ConversionReport(
    model="source", method="x-ecomla", options={"energy": 0.5}, data={}, cache_numbers_per_token_per_layer=12.0,
    cache_bytes_per_token=48.0, source_cache_bytes_per_token=96.0, predicted_cache_bytes_per_token=48.0,
    cache_percent_of_source=50.0, parameters_added=0, conversion_seconds=1.5, peak_memory_bytes=1000, dtype="float32",
    seed=0, layers=[LAYER],
)  # fmt: skip
BENCHMARK = BenchmarkReport(
    model="model", options={}, data={}, dtype="float32", device="cpu", cache_numbers_per_token=12.0,
    memory_budget_bytes=10**9, memory=[MemoryRow("model", "default", 8, 1)],
)  # fmt: skip
SAVED = asdict(CONVERSION)

BROKEN: dict[str, tuple[str, str]] = {
    "no JSON": ("model: source", "is not JSON in UTF-8"),
    "empty": ("", "is not JSON in UTF-8"),
    "a list": ("[]", r"its content is \[\], not an object"),
    "a number": ("3", "its content is 3, not an object"),
    "another program's": ('{"name": "x"}', "the field model is missing"),
    "a field is missing": (
        json.dumps({k: v for k, v in SAVED.items() if k != "layers"}),
        "the field layers is missing",
    ),
    "a number for a name": (json.dumps({**SAVED, "model": 3}), "the field model is 3, not a text"),
    "a word for the layers": (json.dumps({**SAVED, "layers": "all"}), "the field layers is 'all', not a list"),
    "a layer that is none": (json.dumps({**SAVED, "layers": [3]}), r"the field layers\[0\] is 3, not an object"),
    "half a layer": (
        json.dumps({**SAVED, "layers": [SAVED["layers"][0], {"layer": 1}]}),
        r"the field layers\[1\]\.attention_form is missing",
    ),
    "a list of options": (json.dumps({**SAVED, "options": []}), r"the field options is \[\], not an object"),
}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    for report in (CONVERSION, BENCHMARK):
        report.write(tmp_path)
        assert type(report).read(tmp_path) == report


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_report_is_named(case: str, tmp_path: Path) -> None:
    content, words = BROKEN[case]
    path = tmp_path / "conversion_report.json"
    path.write_text(content)
    with pytest.raises(ReportError, match=words) as caught:
        ConversionReport.read(tmp_path)
    assert str(caught.value).startswith(f"report: {path} ")
    assert "optimum-cli mla-convert wrote, or run it again" in str(caught.value)
    path.unlink()
    with pytest.raises(
        ReportError, match=r"No such file or directory\. Name a folder that optimum-cli mla-convert wrote"
    ):
        ConversionReport.read(tmp_path)


def test_a_newer_version_may_say_more_and_an_older_one_less(tmp_path: Path) -> None:
    saved = json.loads(json.dumps(SAVED))
    newer = {**saved, "moon": "full", "layers": [{**saved["layers"][0], "moon": 1}]}
    (tmp_path / "conversion_report.json").write_text(json.dumps(newer))
    assert ConversionReport.read(tmp_path) == CONVERSION

    for name in ("machine", "versions", "perplexity_before", "perplexity_after"):
        del saved[name]
    for name in ("q_lora_rank", "healed_error", "state_error", "rope_cache"):
        del saved["layers"][0][name]
    saved["cache_bytes_per_token"] = 48  # a whole number, as some programs write it
    (tmp_path / "conversion_report.json").write_text(json.dumps(saved))
    assert ConversionReport.read(tmp_path) == CONVERSION


@pytest.mark.parametrize("kind", [*Report.__subclasses__(), *SourceReport.__subclasses__(), LayerReport, MemoryRow])
def test_what_may_be_none_may_be_missing(kind: type) -> None:
    """Reports of older versions lack fields that were added since."""
    hints = get_type_hints(kind)
    for field in fields(kind):
        if NoneType in get_args(hints[field.name]):
            assert field.default is None, field.name


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(field=st.sampled_from(sorted(SAVED)), value=JSON)
def test_any_value_is_taken_as_it_is_or_refused(
    field: str, value: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("any") / "conversion_report.json"
    path.write_text(json.dumps({**SAVED, field: value}))
    report = said = None
    try:
        report = ConversionReport.read(path.parent)
    except ReportError as error:
        said = str(error)
    if report is None:
        assert field in said
        assert json.dumps(value) != json.dumps(SAVED[field])
    else:
        assert getattr(report, field) == value
        assert replace(report, **{field: getattr(CONVERSION, field)}) == CONVERSION


COMMANDS: dict[str, Callable[[str, Path], Any]] = {
    "finetune": lambda model, out: finetune(model, out, "nowhere.txt"),
    "benchmark": lambda model, out: benchmark(model, out),
    "inspect": lambda model, out: inspect(model),
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    source_model("llama").save_pretrained(folder / "source")
    convert(str(folder / "source"), folder / "converted", "x-ecomla", {"kv_cache_ratio": 0.5}, UNCALIBRATED)
    return folder / "converted"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("case", ["no JSON", "another program's"])
def test_each_command_that_reads_a_report_says_so(command: str, case: str, converted: Path, tmp_path: Path) -> None:
    model = shutil.copytree(converted, tmp_path / "model")
    (model / "conversion_report.json").write_text(BROKEN[case][0])
    with pytest.raises(ReportError, match=rf"report: {model}/conversion_report\.json .*{BROKEN[case][1]}"):
        COMMANDS[command](str(model), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_comparison_names_the_file_that_is_none(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        BENCHMARK.write(tmp_path / name)
    path = tmp_path / "two" / "report.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "memory": [{"role": "model"}]}))
    with pytest.raises(ReportError, match=rf"report: {path} .*memory\[0\]\.cache is missing"):
        compare([tmp_path / "one", tmp_path / "two"], tmp_path / "out")
    arguments = ["--compare", str(tmp_path / "one"), str(tmp_path / "two"), "--overwrite"]
    done = subprocess.run(
        [PROGRAM, "mla-benchmark", *arguments], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = [line for line in done.stderr.splitlines() if "optimum.quanto.subpackage" not in line]
    assert line.startswith(f"error: report: {path} ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
