"""The random models of the experiment on large models, and what a conversion of one reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.large import run, write_random_model

CONFIG: dict[str, Any] = {
    "shape": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 60,
        "max_position_embeddings": 64,
    },
    "dtype": "bfloat16",
    "windows": 4,
    "window_tokens": 16,
    "options": {"kv_cache_ratio": 0.5},
}


def test_a_random_model_loads(tmp_path: Path) -> None:
    written = write_random_model(tmp_path / "model", CONFIG, 3)
    model, notes = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(notes.values())
    assert model.config.num_hidden_layers == 3
    assert model.dtype is torch.bfloat16
    assert written == sum(parameter.nbytes for parameter in model.parameters())
    assert model.model.layers[2].mlp.up_proj.weight.float().std().item() > 0.01
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == 4


def test_a_conversion_is_measured_in_a_process_of_its_own() -> None:
    found = run(CONFIG, 2)
    assert found["layers"] == 2
    assert 0 < found["conversion_seconds"] < found["seconds"]
    assert found["cpu_seconds"] > 0
    assert found["peak_memory_bytes"] > 1e8
    assert [stage["name"] for stage in found["stages"]][:3] == ["load", "measure the source", "convert"]
