"""Models in which a layer does nothing: blocks of zeros as LLaMA Pro adds them, dead norms, keys or values of zeros."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_mla import GQA2MLA, MHA2MLA, CalibrationStatistics, XEcoMLA
from optimum_mla.convert.transformation import MLATransformation
from optimum_mla.core.errors import CorruptWeightsError
from optimum_mla.measure.verify import verify
from tests.cases import source_model, token_ids

SMALL: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 32, "head_dim": 8, "intermediate_size": 40}
LAYER = 1
"""The layer that has zeros. The other one has none."""
HEAD = slice(0, SMALL["head_dim"])
"""Rows of the first key or value head."""


def zeros(*names: str, rows: slice = slice(None)) -> Callable[[nn.Module], None]:
    """What fills some rows of the weights of some modules of a layer with zeros, and of their biases if all rows."""

    def change(layer: nn.Module) -> None:
        for name in names:
            for parameter in layer.get_submodule(name).parameters():
                parameter[rows] = 0

    return change


def constant_inputs(layer: nn.Module) -> None:
    layer.input_layernorm.weight.zero_()  # type: ignore[union-attr, operator]


ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
KINDS: dict[str, tuple[str, Callable[[nn.Module], None]]] = {
    "identity block": ("llama", zeros("self_attn.o_proj", "mlp.down_proj")),
    "layer switched off": ("llama with biases", zeros(*ATTENTION, "mlp.up_proj", "mlp.gate_proj", "mlp.down_proj")),
    "values": ("llama", zeros("self_attn.v_proj")),
    "keys": ("llama", zeros("self_attn.k_proj")),
    "queries": ("llama", zeros("self_attn.q_proj")),
    "keys and values": ("qwen3", zeros("self_attn.k_proj", "self_attn.v_proj")),
    "one key head": ("llama", zeros("self_attn.k_proj", rows=HEAD)),
    "one value head": ("llama", zeros("self_attn.v_proj", rows=HEAD)),
    "norm before": ("llama", zeros("input_layernorm")),
    "constant inputs": ("stablelm", constant_inputs),
    "norm after": ("olmo2", zeros("post_attention_layernorm")),
    "norm of the keys": ("qwen3", zeros("self_attn.k_norm")),
    "norm of the queries": ("qwen3", zeros("self_attn.q_norm")),
}
"""Name -> family, and what makes the zeros."""
SILENT = {"identity block", "layer switched off", "values", "keys and values", "norm before"}
"""Kinds in which the attention adds nothing to the state."""

Method = Callable[[Any], MLATransformation]
CALIBRATED: dict[str, Method] = {
    "ranks": lambda ids: GQA2MLA(kv_cache_ratio=0.5, calibration=ids),
    "ranks by energy": lambda ids: GQA2MLA(kv_cache_ratio=0.5, rank_allocation="energy", calibration=ids),
    "energy": lambda ids: GQA2MLA(energy=0.8, calibration=ids),
    "one latent": lambda ids: GQA2MLA(kv_cache_ratio=0.5, positional="full", heal=False, calibration=ids),
    "shared rope": lambda ids: GQA2MLA(kv_cache_ratio=0.75, rope_cache="cached", shared_rope=True, calibration=ids),
    "latent norm": lambda ids: GQA2MLA(kv_cache_ratio=0.75, rope_cache="cached", latent_norm=True, calibration=ids),
    "mha2mla": lambda ids: MHA2MLA(kv_cache_ratio=0.5, qk_rope_head_dim=2, rank_allocation="uniform", calibration=ids),
    "x-ecomla": lambda ids: XEcoMLA(
        kv_cache_ratio=0.5, shared_rope=True, rope_selection="contribution", calibration=ids
    ),
}
PLAIN: dict[str, Method] = {
    "split": lambda ids: GQA2MLA(kv_cache_ratio=0.5),
    "energy": lambda ids: GQA2MLA(energy=0.8),
    "joint": lambda ids: MHA2MLA(kv_cache_ratio=0.5),
    "norm and query energy": lambda ids: XEcoMLA(kv_cache_ratio=0.5, q_energy=0.8, latent_norm=True),
}
STORED = ("energy", "mha2mla")
"""Methods that are tried with statistics too; the others take the same way."""
IDS = token_ids(3, 20)


def model_with_zeros(kind: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    family, change = KINDS[kind]
    model = source_model(family, dtype, **SMALL)
    with torch.no_grad():
        change(model.model.layers[LAYER])
    return model


def added(model: PreTrainedModel) -> Tensor:
    """What the attention of the layer adds to the state."""
    found: list[Tensor] = []
    attention: Any = model.model.layers[LAYER].self_attn
    hook = attention.register_forward_hook(lambda _, args, output: found.append(output[0]))
    with torch.no_grad():
        model(IDS)
    hook.remove()
    return found[0]


def check(kind: str, transformation: MLATransformation, model: PreTrainedModel) -> PreTrainedModel:
    """Convert a model, and check what comes out of it."""
    output = model.model.layers[LAYER].self_attn.o_proj.weight.clone()
    converted: Any = transformation(model)
    verify(converted)
    for name, tensor in converted.state_dict().items():
        assert tensor.isfinite().all(), name
        assert tensor.abs().max() < 1e5, name
    if kind in SILENT:
        assert torch.equal(converted.model.layers[LAYER].self_attn.o_proj.weight, output)
        assert added(converted).abs().max() <= 1e-6
    return converted


@pytest.mark.parametrize("way", CALIBRATED)
@pytest.mark.parametrize("kind", ["identity block", "norm before"])
def test_every_way_converts_a_layer_that_does_nothing(kind: str, way: str) -> None:
    check(kind, CALIBRATED[way](IDS), model_with_zeros(kind))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("identity block", "norm before")])
def test_every_kind_of_zeros_converts(kind: str) -> None:
    for way in ("mha2mla", "one latent"):
        check(kind, CALIBRATED[way](IDS), model_with_zeros(kind))


@pytest.mark.parametrize("way", STORED)
@pytest.mark.parametrize("kind", ["identity block", "values", "norm before"])
def test_statistics_of_zeros_convert(kind: str, way: str, tmp_path: Path) -> None:
    model = model_with_zeros(kind, torch.bfloat16)
    check(kind, CALIBRATED[way](CalibrationStatistics.gather(model, IDS, tmp_path)), model)


@pytest.mark.parametrize("way", PLAIN)
@pytest.mark.parametrize("kind", ["layer switched off", "values", "norm of the keys"])
def test_zeros_convert_without_calibration(kind: str, way: str) -> None:
    check(kind, PLAIN[way](None), model_with_zeros(kind))


@pytest.mark.parametrize("way", ["ranks", "shared rope"])
def test_a_model_of_zeros_alone_converts(way: str) -> None:
    model = model_with_zeros("identity block")
    with torch.no_grad():
        for layer in model.model.layers:
            zeros("self_attn.o_proj", "mlp.down_proj")(layer)
        expected = model(IDS).logits
        converted: Any = CALIBRATED[way](IDS)(model)
        verify(converted)
        assert torch.equal(converted(IDS).logits, expected)


def test_a_token_of_zeros_decides_nothing() -> None:
    """The state of a token whose embedding is zero stays zero, and an error in it would be infinitely large."""
    model = source_model("llama", **SMALL)
    with torch.no_grad():
        model.model.embed_tokens.weight[IDS[:, 0]] = 0
        expected = model(IDS[:, 1:]).logits
        converted: Any = GQA2MLA(kv_cache_ratio=0.75, calibration=IDS)(model)
        error = (converted(IDS[:, 1:]).logits - expected).norm() / expected.norm()
    assert error < 0.2


def test_what_leaves_the_range_of_every_dtype_is_not_told_to_take_another() -> None:
    model = source_model("llama with yarn")
    with torch.no_grad():
        model.model.layers[LAYER].self_attn.q_proj.weight.fill_(3.2e38)
    with pytest.raises(
        CorruptWeightsError, match=r"left the range of torch\.float32\. Check the weights of the model\."
    ):
        MHA2MLA()(model)
