"""Exact conversions go back to the source, and others as far as the source family can follow."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimum.fx.optimization import ReversibleTransformation
from optimum.fx.optimization import compose as optimum_compose

from optimum_mla import GQA2MLA, MHA2MLA, QuantizeLatentCache, compose, trace
from optimum_mla.core.errors import InvalidValueError, UnsupportedModelError
from tests.cases import FAMILIES, FURTHER_FAMILIES, source_model, token_ids

IDS = token_ids(8, 24)


@pytest.mark.parametrize("family", [*FAMILIES, *FURTHER_FAMILIES])
@torch.no_grad()
def test_an_exact_conversion_goes_back_to_its_source(family: str) -> None:
    source = source_model(family, torch.float32)
    model = copy.deepcopy(source)
    method = GQA2MLA()
    assert isinstance(method, ReversibleTransformation)
    back = method(method(model), reverse=True)
    assert back is model
    assert type(back) is type(source)
    ours = {"_name_or_path", "transformers_version", "architectures"}
    known = source.config.to_dict()
    assert {k: v for k, v in back.config.to_dict().items() if k not in ours} == {
        k: v for k, v in known.items() if k not in ours
    }
    weights = back.state_dict()
    assert weights.keys() == source.state_dict().keys()
    for name, tensor in source.state_dict().items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda said, name=name: name + said)
    torch.testing.assert_close(back(IDS).logits, source(IDS).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_below_full_rank_the_result_computes_what_the_conversion_does() -> None:
    model = source_model("qwen2")
    method = GQA2MLA(kv_cache_ratio=0.5, positional="full", calibration=IDS)
    expected = method(model)(IDS).logits
    method(model, reverse=True)
    assert type(model).__name__ == "Qwen2ForCausalLM"
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.linalg.matrix_rank(model.model.layers[0].self_attn.k_proj.weight.double(), rtol=1e-5) <= 32


@torch.no_grad()
def test_a_part_of_a_hybrid_goes_back() -> None:
    model = source_model("llama")
    expected = compose(GQA2MLA(layers="0"), MHA2MLA(kv_cache_ratio=0.5, layers="1", calibration=IDS))(model)(IDS).logits
    GQA2MLA()(model, reverse=True)
    assert [layer.attention_form for layer in model.config.per_layer_config] == ["source", "decoupled", "source"]
    assert type(model).__name__ == "LlamaMLAForCausalLM"
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_graphs_and_compositions_go_back() -> None:
    source = source_model("llama")
    expected = source(IDS).logits
    both = optimum_compose(GQA2MLA(layers="0-1"), GQA2MLA(layers="2"), inplace=True)
    assert isinstance(both, ReversibleTransformation)
    graph = both(trace(source))
    assert any("kv_a_proj" in name or "k_a_proj" in name for name, _ in graph.named_parameters())
    graph = both(graph, reverse=True)
    assert not any("_a_proj" in name for name, _ in graph.named_parameters())
    torch.testing.assert_close(graph(IDS), expected, rtol=1e-4, atol=1e-4)
    stored = compose(GQA2MLA(), QuantizeLatentCache(bits=4, backend="hqq", group_size=16))
    model = stored(source)
    assert model.config.latent_cache["bits"] == 4
    model = stored(model, reverse=True)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not hasattr(model.config, "latent_cache")


REFUSED: dict[str, tuple[Callable[[Any], Any], type[Exception]]] = {
    "it is not converted": (lambda model: None, UnsupportedModelError),
    "only some dims rotate": (GQA2MLA(kv_cache_ratio=0.5, calibration=IDS), UnsupportedModelError),
    "have biases, for which its family has no place": (
        GQA2MLA(kv_cache_ratio=0.5, positional="full", calibration=IDS),
        UnsupportedModelError,
    ),
    "got 'mha2mla', allowed: layers converted by gqa2mla": (MHA2MLA(kv_cache_ratio=0.5), InvalidValueError),
}


@pytest.mark.filterwarnings("ignore::optimum_mla.core.errors.UncalibratedWarning")
@pytest.mark.parametrize("said", REFUSED)
def test_what_cannot_go_back_is_said_and_unchanged(said: str) -> None:
    convert, error = REFUSED[said]
    model = source_model("llama")
    convert(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=said):
        GQA2MLA()(model, reverse=True)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
