"""The reproduction of three papers' printed cache sizes and parameter counts."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "paper_tables.py"


@pytest.fixture(scope="module")
def tables() -> Iterator[ModuleType]:
    """The script as a module; `benchmarks` is no package, so it is loaded by path."""
    spec = importlib.util.spec_from_file_location("paper_tables", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up while it loads
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[spec.name]


def find(tables: ModuleType, paper: str, table: str, setting: str, quantity: str, model: str) -> Any:
    found = [
        figure
        for figure in tables.all_figures()
        if (figure.paper, figure.table, figure.setting, figure.quantity, figure.model.name)
        == (paper, table, setting, quantity, model)
    ]
    assert len(found) == 1
    return found[0]


def test_script_agrees_with_all_three_papers(tmp_path: Path) -> None:
    output = tmp_path / "made" / "tables.json"
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--output", str(output)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    records = json.loads(output.read_text(encoding="utf-8"))
    for paper in ("MHA2MLA", "X-EcoMLA", "TransMLA"):
        assert paper in result.stdout
        assert any(record["paper"] == paper and record["ok"] == "yes" for record in records)
    assert {record["ok"] for record in records} == {"yes"}


def test_no_figure_is_listed_twice(tables: ModuleType) -> None:
    figures = tables.all_figures()
    keys = {(f.paper, f.table, f.model.name, f.setting, f.quantity) for f in figures}
    assert len(keys) == len(figures)


def test_wrong_printed_figure_is_reported_by_name(tables: ModuleType) -> None:
    figures = tables.all_figures()
    wrong = replace(figures[0], printed="-68.73")
    lines = tables.disagreements([wrong, *figures[1:]])
    assert len(lines) == 1
    for part in ("MHA2MLA", "Table 1", "SmolLM-135M", "d_kv 32", "-68.73", "-68.75"):
        assert part in lines[0]
    assert wrong.verdict == "no"
    assert tables.disagreements(figures) == []


def test_main_exits_with_1_on_a_wrong_figure(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = replace(tables.all_figures()[0], printed="-70.00")
    monkeypatch.setattr(tables, "all_figures", lambda: [wrong])
    monkeypatch.setattr(sys, "argv", ["paper_tables.py", "--output", str(tmp_path / "tables.json")])
    assert tables.main() == 1
    assert "-70.00" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("printed", "agrees"),
    [
        ("-96.87", True),  # truncated
        ("-96.88", True),  # rounded
        ("-96.89", False),
        ("-96.86", False),
        ("-97", True),
        ("-96.8", True),
        ("-97.0", False),
        ("-96.875", True),
        ("-96.873", False),
        ("-98", False),
    ],
)
def test_tolerance_is_one_unit_of_the_last_printed_digit(tables: ModuleType, printed: str, agrees: bool) -> None:
    figure = find(tables, "MHA2MLA", "Table 2", "d_kv 16, Int4", tables.CACHE_CHANGE, "Llama-2-7B")
    assert figure.computed == -96.875
    assert replace(figure, printed=printed).agrees is agrees


def test_remarks_name_figures_that_their_printed_settings_do_not_give(tables: ModuleType) -> None:
    remarked = [figure for figure in tables.all_figures() if figure.remark]
    assert [(figure.table, figure.printed) for figure in remarked] == [
        ("Table 9", "6.25"),
        ("Table 10", "78.1"),
        ("Table 11", "6.25"),
    ]
    assert "remark: X-EcoMLA Table 10, printed 78.1" in tables.format_table(remarked)
    model = tables.LLAMA32_1B
    as_printed = model.converted(tables.x_ecomla_layer(model, 512, 32), (1, 3, 5, 7, 8, 10, 12, 14))
    assert 100 * as_printed.cache_ratio == 76.5625
    assert 100 * model.converted(tables.x_ecomla_layer(model, 48, 32)).cache_ratio == 7.8125


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # tensor elements in the published safetensors files
        ("SMOLLM_135M", 134_515_008),
        ("SMOLLM_360M", 361_821_120),
        ("SMOLLM_1B7", 1_711_376_384),
        ("LLAMA2_7B", 6_738_415_616),
        ("LLAMA32_1B", 1_235_814_400),
        ("LLAMA32_3B", 3_212_749_824),
        ("LLAMA3_8B", 8_030_261_248),
        ("LLAMA31_8B", 8_030_261_248),
        ("QWEN25_7B", 7_615_616_512),
        ("QWEN25_14B", 14_770_033_664),
    ],
)
def test_source_parameters_are_the_published_ones(tables: ModuleType, name: str, parameters: int) -> None:
    model = getattr(tables, name)
    assert model.parameters == parameters
    assert model.source.parameters_added == 0
    assert model.source.cache_ratio == 1


def test_hand_computed_mha2mla_layer(tables: ModuleType) -> None:
    layer = tables.mha2mla_layer(tables.SMOLLM_135M, 32)  # 3 key heads of 64 dims, 8 of them with RoPE
    assert layer.cache_numbers == 3 * 32 + 3 * 8
    assert layer.source_cache_numbers == 2 * 3 * 64
    layer = tables.mha2mla_layer(tables.LLAMA2_7B, 16)  # 32 key heads of 128 dims, 16 of them with RoPE
    assert layer.cache_numbers == 32 * 16 + 32 * 16
    assert layer.source_cache_numbers == 2 * 32 * 128


def test_hand_computed_x_ecomla_layer(tables: ModuleType) -> None:
    layer = tables.x_ecomla_layer(tables.LLAMA32_1B, 512, 32, 864)
    assert layer.cache_numbers == 512 + 32
    query = 2048 * 864 + 864 * 32 * 64
    key_value = 2048 * 512 + 2048 * 32 + 512 * 32 * (32 + 64)
    assert layer.parameters == query + key_value + 32 * 64 * 2048
    figure = find(tables, "X-EcoMLA", "Table 6", "r 512, R 32, r_q 864", tables.PARAMETERS, "Llama-3.2-1B")
    assert figure.computed == (1_235_814_400 + 16 * (layer.parameters - 2048 * (2 * 2048 + 2 * 512))) / 1e9


def test_hand_computed_hybrid_converts_only_the_layers_named(tables: ModuleType) -> None:
    figure = find(tables, "X-EcoMLA", "Table 10", "r 512, R 64, 8 of 16 layers", tables.CACHE_SIZE, "Llama-3.2-1B")
    forms = [layer.attention_form for layer in figure.geometry.layers]
    assert [index for index, form in enumerate(forms) if form == "decoupled"] == [1, 3, 5, 7, 8, 10, 12, 14]
    assert figure.geometry.cache_numbers == 8 * 1024 + 8 * 576


def test_hand_computed_transmla_model(tables: ModuleType) -> None:
    model = tables.QWEN25_7B
    converted = model.converted(tables.transmla_layer(model))
    assert converted.cache_numbers == converted.source_cache_numbers == 28 * (512 + 512)
    # Two up-projections of 512 to 28 heads of 128 per layer; the key and value biases grow from 4 heads to 28.
    assert converted.parameters_added == 28 * (2 * 512 * 3584 + 2 * (3584 - 512))
