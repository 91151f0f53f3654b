"""Shards, and checkpoints that Transformers reads."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from optimum_mla.io.shards import INDEX, data_bytes, place_shards, read_shard, write_shard
from tests.cases import source_model

TENSORS = {"a.x": torch.randn(3, 5), "a.y": torch.arange(4), "b": torch.randn(2, 2).T.to(torch.bfloat16)}


def test_a_shard_gives_back_its_tensors(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    assert write_shard(path, TENSORS) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert os.listdir(tmp_path) == ["one.safetensors"]
    read = read_shard(path)
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in TENSORS.items())
    assert set(read_shard(path, "a.")) == {"x", "y"}
    assert data_bytes(path) == sum(tensor.nbytes for tensor in TENSORS.values())


@pytest.mark.parametrize("links", [True, False])
def test_placed_shards_are_a_checkpoint(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = source_model("llama")
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    state["lm_head.weight"] = model.lm_head.weight.detach().clone()
    layers = [{n: t for n, t in state.items() if n.startswith(f"model.layers.{i}.")} for i in range(3)]
    rest = {name: tensor for name, tensor in state.items() if ".layers." not in name}
    shards = [tmp_path / f"{index}.safetensors" for index in range(4)]
    for path, part in zip(shards, [rest, *layers], strict=True):
        write_shard(path, part)
    if not links:

        def refuse(*args: object) -> None:
            raise OSError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    folder = tmp_path / "model"
    folder.mkdir()
    model.config.save_pretrained(folder)
    place_shards(shards, folder)
    index = json.loads((folder / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
    assert all(name in load_file(folder / file) for name, file in index["weight_map"].items())
    assert all(path.is_file() for path in shards)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
