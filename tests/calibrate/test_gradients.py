"""Gradients of what old tokens are read as tell how far the predictions of whole models move."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optimum_mla.cache.codec_layer import ExactTokens
from optimum_mla.calibrate import gradients, perplexity
from optimum_mla.calibrate.gradients import Gradients
from optimum_mla.calibrate.walk import CalibrationWalk
from optimum_mla.families.project import SourceAttention
from optimum_mla.models.layer_source import LayerSource
from optimum_mla.ops.blockwise import capped
from optimum_mla.ops.rotary import Rotation, rotate
from tests.cases import source_model, token_ids

EXACT = ExactTokens(sinks=2, recent=4, together=4)
TOKENS, DRAWS, TOKEN = 16, 600, 5


class MovedOldTokens(nn.Module):
    """Attention, query by query, in which what is read of old tokens is off by some vectors, [L, w]."""

    def __init__(self, source: SourceAttention, o_proj: nn.Module, moved: Tensor) -> None:
        super().__init__()
        self.source, self.o_proj, self.moved = source, o_proj, moved

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any
    ) -> tuple[Tensor, None]:
        g = self.source.geometry
        query, key, value, _ = self.source.project(hidden_states)
        rotation = Rotation(*(part.unsqueeze(1) for part in self.source.pairs.cos_sin(position_embeddings)))
        off = self.moved.unflatten(1, (2, g.num_key_value_heads, -1)).permute(1, 2, 0, 3)[:, None]  # [2, 1, G, L, D]
        query = rotate(query, rotation)
        exact, other = (
            [part.repeat_interleave(query.shape[1] // key.shape[1], 1) for part in (rotate(keys, rotation), values)]
            for keys, values in ((key, value), (key + off[0], value + off[1]))
        )
        rows = []
        for at in range(hidden_states.shape[1]):
            read = [
                torch.stack(
                    [(two if EXACT.sinks <= j <= at - EXACT.recent else one)[:, :, j] for j in range(at + 1)], dim=2
                )
                for one, two in zip(exact, other, strict=True)
            ]
            logits = capped((query[:, :, at : at + 1] @ read[0].mT) * g.head_dim**-0.5, g.logit_cap)
            rows.append(logits.softmax(-1) @ read[1])
        return self.o_proj(torch.cat(rows, 2).transpose(1, 2).flatten(2)), None


def through(walk: CalibrationWalk, found: Gradients, layers: tuple[int, ...]) -> dict[int, tuple[Tensor, Tensor]]:
    for _ in range(walk.model.num_layers):
        found.advance()
    return {layer: (vectors, of) for layer, vectors, of in found.of_layers(layers, "gradients")}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "granite"])
def test_squared_gradients_are_the_divergence_to_second_order(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "GRADIENT_TOKENS", DRAWS * TOKENS)
    monkeypatch.setattr(gradients, "TOKENS_AT_ONCE", 9)
    monkeypatch.setattr(perplexity, "VOCABULARY_ROWS", 40)
    source = source_model(family, torch.float64)
    layer = 0 if family == "llama" else 1
    with torch.no_grad():
        ids = token_ids(1, TOKENS)
        # Each copy of the window has signs of its own.
        walk = CalibrationWalk(LayerSource(source), ids.expand(DRAWS, -1))
        vectors, found = through(walk, Gradients(walk, EXACT), (0, 1, 2))[layer]
        found = found.unflatten(0, (DRAWS, TOKENS))
        assert not found[:, : EXACT.sinks].any()
        assert not found[:, TOKENS - EXACT.recent :].any()
        off = torch.zeros_like(vectors[:TOKENS])
        off[TOKEN] = 1e-3 * torch.randn(off.shape[1], dtype=off.dtype)
        expected = source(ids).logits.log_softmax(-1)
        for moved in (off, 0 * off):
            other = copy.deepcopy(source)
            place = LayerSource(source).attention(layer)
            attention = MovedOldTokens(place, other.model.layers[layer].self_attn.o_proj, moved)
            other.model.layers[layer].self_attn = attention
            apart = expected - other(ids, use_cache=False).logits.log_softmax(-1)
            divergence = float((expected.exp() * apart).sum(-1).mean())
            told = float((found[:, TOKEN] @ moved[TOKEN]).square().mean()) / 2 / TOKENS
            assert told == pytest.approx(divergence, rel=0.2, abs=1e-12)
    assert divergence < 1e-12


def test_windows_are_spread_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_model("llama")
    with torch.no_grad():
        walk = CalibrationWalk(LayerSource(source), token_ids(8, TOKENS))
        monkeypatch.setattr(gradients, "GRADIENT_TOKENS", 4 * TOKENS)
        layers = tuple(range(walk.model.num_layers))
        found = through(walk, Gradients(walk, EXACT), layers)
        assert list(found) == list(reversed(layers))
        own = LayerSource(source).attention(0)
        states = LayerSource(source).embed(token_ids(8, TOKENS)[::2])
        heads = own.project(source.model.layers[0].input_layernorm(states))
        vectors = torch.cat([part.transpose(1, 2).flatten(2) for part in (heads.key, heads.value)], dim=-1)
        torch.testing.assert_close(found[0][0], vectors.flatten(0, 1))
        # No more states are kept than there is room for, but those of one window always.
        monkeypatch.setattr(gradients, "STATE_NUMBERS", 1)
        walk = CalibrationWalk(LayerSource(source), token_ids(8, TOKENS))
        assert len(through(walk, Gradients(walk, EXACT), (2,))[2][0]) == TOKENS
