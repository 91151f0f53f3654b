"""Processes of `torchrun` convert a model together, to what one process converts it to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from optimum_mla.core.errors import OutputError
from optimum_mla.pipeline import TextOptions, convert
from optimum_mla.pipeline.unfinished import UnfinishedConversion
from tests.cases import source_model, token_ids

REFERENCE = Path(__file__).resolve().parents[2] / "benchmarks" / "reference_model"
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
# Neither the windows that are held back nor the others can be shared out evenly.
TEXTS = {"calibration_data": token_ids(1, 1200)[0].tolist(), "calibration_samples": 13, "calibration_length": 72}
WAYS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "codes": ("llama", "gqa2mla", {"kv_cache_budget": 0.4}),
    "key norms": ("qwen3", "gqa2mla", {"kv_cache_ratio": 0.5}),
    "one rope for all": ("llama", "gqa2mla", {"kv_cache_ratio": 0.5, "rope_cache": "cached", "shared_rope": True}),
    "contribution": ("llama", "mha2mla", {"kv_cache_ratio": 0.5, "rope_selection": "contribution"}),
    "norms after": ("olmo2", "gqa2mla", {"kv_cache_ratio": 0.5}),
    "resumed": ("llama", "gqa2mla", {"kv_cache_ratio": 0.5}),
}
"""Name -> family, method and its options."""
STOPPED_AT = 1
"""Layer before which the first try of the resumed conversion ended."""


def torchrun(processes: int, *command: str) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run([*start, *command], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def check_same(one: Path, other: Path) -> None:
    """What was made is the same to the last bit, however many processes shared the work."""
    assert read(one / "config.json") == read(other / "config.json")
    for path in one.glob("*.safetensors"):
        expected, found = (load_file(folder / path.name) for folder in (one, other))
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
    (report,) = (path.name for path in one.glob("*_report.json"))
    before, after = (read(folder / report)["perplexity_after"] for folder in (one, other))
    assert after == before


def test_three_processes_convert_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = []
    for name, (family, method, options) in WAYS.items():
        model = tmp_path / family
        if not model.exists():
            source_model(family).save_pretrained(model)
        convert(str(model), tmp_path / name, method, options, TextOptions(**TEXTS))
        case = {"model": str(model), "output": str(tmp_path / f"{name}, shared"), "method": method}
        cases.append({**case, "options": options, "texts": TEXTS, "resume": name == "resumed"})

    def write_layer(self: Any, run: Any, index: int, attention: Any) -> None:
        if index == STOPPED_AT:
            raise OutputError("stopped")
        written(self, run, index, attention)

    written = UnfinishedConversion.write_layer
    with monkeypatch.context() as patch:
        patch.setattr(UnfinishedConversion, "write_layer", write_layer)
        with pytest.raises(OutputError, match="stopped"):
            convert(cases[-1]["model"], cases[-1]["output"], method, options, TextOptions(**TEXTS))
    (tmp_path / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    torchrun(3, str(Path(__file__).with_name("together.py")), str(tmp_path / "cases.json"))
    for name in WAYS:
        check_same(tmp_path / name, tmp_path / f"{name}, shared")
    assert not list(tmp_path.glob(".*"))


def test_the_command_under_torchrun_speaks_with_one_voice(tmp_path: Path) -> None:
    text = ["--calibration-data", str(REFERENCE / "calibration.txt"), "--calibration-samples", "9"]
    words = ["convert", "-m", str(REFERENCE), "--dtype", "float32", *text, "--calibration-length", "96"]
    done = torchrun(2, "-m", "optimum.commands.mla.main", *words, str(tmp_path / "two"))
    assert done.stdout.count("the weights stay as they are") == done.stdout.count("Saved to") == 1
    assert done.stderr.count("error") == 0
    convert(
        str(REFERENCE),
        tmp_path / "one",
        options={"kv_cache_budget": 0.25},
        texts=TextOptions(str(REFERENCE / "calibration.txt"), calibration_samples=9, calibration_length=96),
        dtype="float32",
    )
    check_same(tmp_path / "one", tmp_path / "two")
