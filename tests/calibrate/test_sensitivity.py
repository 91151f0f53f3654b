"""The divergences that replaced attentions cause are those of whole models with one replaced attention each."""

from __future__ import annotations

import copy

import pytest
import torch

from optimum_mla import GQA2MLA
from optimum_mla.calibrate import perplexity, sensitivity
from optimum_mla.calibrate.sensitivity import Sensitivity
from optimum_mla.calibrate.walk import CalibrationWalk
from optimum_mla.convert import Run
from optimum_mla.models.layer_source import LayerSource
from optimum_mla.nn import LatentAttention
from tests.cases import source_model, token_ids

IDS = token_ids(6, 20)


@pytest.mark.parametrize("family", ["llama", "llama multi-head, tied", "gemma2", "granite"])
@torch.no_grad()
def test_divergences_are_those_of_whole_models(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "SENSITIVITY_TOKENS", 70)  # three windows
    monkeypatch.setattr(sensitivity, "TOKENS_AT_ONCE", 32)
    monkeypatch.setattr(perplexity, "VOCABULARY_ROWS", 40)
    source = source_model(family, torch.float64)
    layers = [1, 2] if family == "gemma2" else [0, 2]
    method = GQA2MLA(kv_cache_ratio=0.4, positional="full", calibration=IDS, layers=layers, rank_allocation="uniform")
    attentions = {layer: attention for layer, attention in Run(method, source).steps() if attention is not None}
    walk = CalibrationWalk(LayerSource(source), IDS)
    compared = Sensitivity(walk)
    for layer in range(3):
        if layer in layers:
            compared.replace(attentions[layer])
        if layer < 2:  # `divergences` goes on to the end.
            compared.advance()
    found = compared.divergences("compared")
    assert list(found) == layers
    expected = source(IDS[:3]).logits.log_softmax(-1)
    for layer in layers:
        other = copy.deepcopy(source)
        attention: LatentAttention = attentions[layer]
        other.model.layers[layer].self_attn = attention
        off = expected - other(IDS[:3], use_cache=False).logits.log_softmax(-1)
        assert found[layer] == pytest.approx(float((expected.exp() * off).sum(-1).mean()), rel=1e-6)
        assert found[layer] > 1e-6
