"""Traced models: the same logits, and the same conversions."""

from __future__ import annotations

import pytest
import torch
from optimum.fx.optimization import MergeLinears
from torch.fx import GraphModule

from optimum_mla import GQA2MLA, MHA2MLA, compose, trace
from optimum_mla.core.errors import InvalidValueError, UnsupportedModelError
from tests.cases import FAMILIES, FURTHER_FAMILIES, METHODS, SIZES, source_model, token_ids


@pytest.mark.compat
@pytest.mark.parametrize("family", FAMILIES)
def test_a_traced_model_has_the_same_logits(family: str) -> None:
    model, ids = source_model(family), token_ids()
    traced = trace(model)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        assert torch.equal(traced(ids), model(ids, use_cache=False).logits)
        expected = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        assert torch.equal(traced(ids, mask, positions), expected)


def test_every_attention_is_one_node() -> None:
    traced = trace(source_model("llama"))
    targets = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    attentions = [f"model.layers.{layer}.self_attn" for layer in range(SIZES["num_hidden_layers"])]
    assert [target for target in targets if target in attentions] == attentions


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama with yarn", "qwen2", "qwen3", "mistral with a window"])
def test_a_traced_model_converts_like_the_model(family: str, method: str) -> None:
    ids = token_ids()
    converted = METHODS[method](ids)(source_model(family))
    transformation = METHODS[method](ids)
    traced = transformation(trace(source_model(family)))
    assert isinstance(traced, GraphModule)
    assert traced.meta["config"].to_dict() == converted.config.to_dict()
    nodes = transformation.get_transformed_nodes(traced)
    assert len(nodes) == len(transformation.covered_layers(source_model(family).config))
    with torch.no_grad():
        assert torch.equal(traced(ids), converted(ids, use_cache=False).logits)


@pytest.mark.compat
def test_copies_and_compositions_of_traced_models() -> None:
    traced, ids = trace(source_model("llama")), token_ids()
    hybrid = compose(GQA2MLA(layers="0"), MHA2MLA(kv_cache_ratio=0.5, layers="1-2"))
    converted = hybrid(traced, copy=True)
    with torch.no_grad():
        assert torch.equal(traced(ids), source_model("llama")(ids).logits)
        assert torch.equal(converted(ids), hybrid(source_model("llama"))(ids).logits)
    with pytest.raises(InvalidValueError, match="layers"):
        hybrid(converted)


def test_a_foreign_graph_is_refused() -> None:
    foreign = torch.fx.symbolic_trace(torch.nn.Linear(2, 2))
    with pytest.raises(UnsupportedModelError, match=r"optimum_mla\.trace of one"):
        GQA2MLA()(foreign)


@pytest.mark.parametrize("family", [*FAMILIES, *FURTHER_FAMILIES])
def test_optimums_own_transformations_work_on_the_rest_of_the_graph(family: str) -> None:
    model, ids = source_model(family), token_ids()
    gated = [name for name, _ in model.named_modules() if name.endswith("mlp.gate_proj")]
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    merging = MergeLinears()
    merged = compose(GQA2MLA(), merging)(trace(model))
    names = dict(merged.named_modules())
    assert [name for name in names if name.endswith("gate_proj-up_proj-merged")] == [
        name.replace("gate_proj", "gate_proj-up_proj-merged") for name in gated
    ]
    assert not any(name in names for name in gated)
    with torch.no_grad():
        assert (merged(ids) - expected).abs().max() < 1e-4
        apart = merging(merged, reverse=True)
        assert (apart(ids) - expected).abs().max() < 1e-4
    assert all(name in dict(apart.named_modules()) for name in gated)
