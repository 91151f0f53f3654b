"""Layers that are read one at a time are those of the model, wherever its weights lie."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_mla import GQA2MLA, trace
from optimum_mla.convert import Run
from optimum_mla.core.errors import CorruptWeightsError, UnsupportedModelError
from optimum_mla.models.layer_source import LayerSource
from tests.cases import FAMILIES, source_model, token_ids

LAYERS = 3
IDS = token_ids(2, 5)
"""Fewer tokens than any window, so that layers need no mask."""


def from_disk(model: PreTrainedModel, folder: Path, dtype: torch.dtype | str = "auto", **options: Any) -> Any:
    """The model with its layers on the disk."""
    model.save_pretrained(folder / "model", **options)
    beside = {f"model.{name}": "cpu" for name in ("embed_tokens", "norm", "rotary_emb")}
    device_map = {**beside, "lm_head": "cpu", "model.layers": "disk"}
    return AutoModelForCausalLM.from_pretrained(
        folder / "model", device_map=device_map, dtype=dtype, offload_folder=folder / "offload"
    )


def spread(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    device_map = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    device_map |= {f"model.layers.{layer}": "cpu" for layer in range(LAYERS)}
    return dispatch_model(copy.deepcopy(model), device_map, force_hooks=True)


PLACES: dict[str, Callable[[PreTrainedModel, Path], Any]] = {
    "memory": lambda model, folder: model,
    "traced": lambda model, folder: trace(model),
    "spread": spread,
    "offloaded to memory": lambda model, folder: cpu_offload(copy.deepcopy(model)),
    "disk": from_disk,
    "disk, many files": lambda model, folder: from_disk(model, folder, max_shard_size="20KB"),
}


def outputs(layer: nn.Module, source: LayerSource, states: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(states.shape[1])[None]
    return layer(states, position_embeddings=source.rotary(states, positions), position_ids=positions)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("place", PLACES)
def test_layers_are_those_of_the_model(family: str, place: str, tmp_path: Path) -> None:
    model = source_model(family)
    source = LayerSource(PLACES[place](model, tmp_path))
    assert source.num_layers == LAYERS
    with torch.no_grad():
        states = source.embedding(IDS)
        wanted = model(IDS, output_hidden_states=True, use_cache=False)
        for layer in range(LAYERS):
            assert torch.allclose(states, wanted.hidden_states[layer], atol=1e-5)
            read = source.layer(layer)
            own = model.get_submodule(f"model.layers.{layer}").state_dict()
            assert read.state_dict().keys() == own.keys()
            assert all(torch.equal(tensor, own[name]) for name, tensor in read.state_dict().items())
            states = outputs(read, source, states)
        logits = source.head()(source.final_norm()(states))
    assert torch.allclose(logits, wanted.logits, atol=1e-5)


@pytest.mark.parametrize("place", ["memory", "traced", "spread", "disk"])
def test_what_is_done_to_a_layer_does_not_change_the_model(place: str, tmp_path: Path) -> None:
    model = source_model("llama").train()
    held = PLACES[place](model, tmp_path)
    held.train()
    before = {name: tensor.clone() for name, tensor in held.state_dict().items()}
    source = LayerSource(held)
    layer = source.layer(1)
    layer.to(torch.float64)
    layer.register_forward_hook(lambda *args: None)
    layer.set_submodule("mlp", nn.Identity())
    wide = source.layer(2, torch.float64)
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float64}
    assert source.layer(2, torch.float64) is wide
    assert not wide.training
    assert held.training
    module = held.get_submodule("model.layers.1")
    assert not module._forward_hooks
    assert not isinstance(module.mlp, nn.Identity)
    for name, tensor in held.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert tensor.is_meta or torch.equal(tensor, before[name])


def test_one_layer_is_kept_at_a_time(tmp_path: Path) -> None:
    source = LayerSource(from_disk(source_model("llama"), tmp_path))
    seen = []
    for layer in range(LAYERS):
        own, wide = source.layer(layer), source.layer(layer, torch.float64)
        assert source.attention(layer).query.dtype == torch.float64
        seen += [weakref.ref(own), weakref.ref(wide)]
        del own, wide
    gc.collect()
    assert [reference() is not None for reference in seen] == 2 * (LAYERS - 1) * [False] + [True, True]


def test_offloaded_weights_are_read_in_the_dtype_that_was_asked_for(tmp_path: Path) -> None:
    model = source_model("llama")
    source = LayerSource(from_disk(model, tmp_path, torch.bfloat16))
    expected = model.model.layers[1].mlp.up_proj.weight.to(torch.bfloat16)
    assert source.dtype is torch.bfloat16
    assert torch.equal(source.layer(1).mlp.up_proj.weight, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_offloaded_weight_that_is_not_finite_is_refused(tmp_path: Path, value: float) -> None:
    loaded = from_disk(source_model("llama"), tmp_path)
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = value
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CorruptWeightsError, match=r"model\.layers\.2\.mlp\.up_proj\.weight holds NaN or infinite"):
        Run(GQA2MLA(kv_cache_ratio=0.5), loaded)


@pytest.mark.parametrize("place", ["spread", "offloaded to memory"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_spread_model_converts_as_one_in_memory(place: str, calibrated: bool, tmp_path: Path) -> None:
    model = source_model("llama")
    held = PLACES[place](model, tmp_path)
    method = GQA2MLA(kv_cache_ratio=0.5, calibration=token_ids(8, 24) if calibrated else None)
    expected, converted = method(model), method(held)
    assert converted is held
    with torch.no_grad():
        assert torch.equal(converted(token_ids()).logits, expected(token_ids()).logits)
    assert all(not parameter.is_meta for parameter in converted.parameters())


def test_a_model_on_the_disk_cannot_be_changed_in_place(tmp_path: Path) -> None:
    loaded = from_disk(source_model("llama"), tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"offloaded to the disk\. Convert its folder with mla-convert"):
        GQA2MLA(kv_cache_ratio=0.5)(loaded)
    assert loaded(token_ids()).logits.isfinite().all()
