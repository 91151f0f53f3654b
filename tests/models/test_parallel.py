"""Tensor and pipeline parallelism: the plan of a model, and two processes that compute what one does."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from optimum_mla import GQA2MLA, MHA2MLA, MLATransformation, XEcoMLA
from tests.cases import source_model, token_ids

MODELS: dict[str, tuple[str, Callable[[Tensor], MLATransformation], float]] = {
    "one latent": ("llama", lambda ids: GQA2MLA(kv_cache_ratio=0.5, positional="full", calibration=ids), 0.5),
    "key norms": ("qwen3", lambda ids: GQA2MLA(kv_cache_ratio=0.5, positional="full", calibration=ids), 0.5),
    "rotary key cached": (
        "llama",
        lambda ids: GQA2MLA(kv_cache_ratio=0.5, rope_cache="cached", shared_rope=True, calibration=ids),
        0.5,
    ),
    "latent of queries": ("qwen2", lambda ids: XEcoMLA(kv_cache_ratio=0.5, q_lora_rank=20, calibration=ids), 0.5),
    "some layers": (
        "llama",
        lambda ids: XEcoMLA(kv_cache_ratio=0.5, qk_rope_head_dim=8, layers=[0, 2], calibration=ids),
        0.5,
    ),
    "rotary key rebuilt": ("llama", lambda ids: GQA2MLA(kv_cache_ratio=0.5, calibration=ids), 1.0),
    "rotary key per head": ("llama", lambda ids: MHA2MLA(kv_cache_ratio=0.5, calibration=ids), 1.0),
}
"""Name -> family, method, and the share of the attention's output projection that each of two processes holds."""


@pytest.mark.slow
def test_two_processes_compute_generate_and_train_as_one(tmp_path: Path) -> None:
    for name, (family, method, _) in MODELS.items():
        method(token_ids(4, 24))(source_model(family)).save_pretrained(tmp_path / name)
    script = Path(__file__).with_name("processes.py")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*run, str(script), str(tmp_path)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == MODELS.keys()
    for name, (_, _, share) in MODELS.items():
        assert found[name]["logits"] < 1e-4, name
        assert found[name]["same tokens"], name
        assert found[name]["gradients"] < 1e-4, name
        assert found[name]["share"] == share, name
        assert found[name]["layers here"] in (1, 2), name


@pytest.mark.parametrize("name", MODELS)
def test_plans_name_projections_of_the_model(name: str) -> None:
    family, method, share = MODELS[name]
    model = method(token_ids(4, 24))(source_model(family))
    modules = {re.sub(r"\.\d+(\.|$)", r".*\1", path) for path, _ in model.named_modules()}
    plan = model.config.base_model_tp_plan
    assert {f"model.{path}" for path in plan} <= modules
    assert any("self_attn" in path for path in plan) == (share < 1)
    heads = source_model(family).config.base_model_tp_plan
    assert {path: how for path, how in plan.items() if "self_attn" not in path}.items() <= heads.items()


def test_the_plan_stays_out_of_the_saved_config(tmp_path: Path) -> None:
    model = XEcoMLA(kv_cache_ratio=0.5, calibration=token_ids(4, 24))(source_model("llama", torch.float32))
    model.save_pretrained(tmp_path)
    assert "tp_plan" not in (tmp_path / "config.json").read_text(encoding="utf-8")
