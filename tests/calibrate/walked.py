"""A model whose first layer was replaced, the walk before the second one, and what slow loops see there."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_mla.calibrate.layer import LayerCalibration
from optimum_mla.calibrate.walk import CalibrationWalk
from optimum_mla.models import SourceAttention
from optimum_mla.models.layer_source import LayerSource
from tests.cases import source_model, token_ids

FAMILIES = ["llama", "qwen3", "llama with yarn", "mistral with a window"]
HEADS, GROUPS, HEAD_DIM, PAIRS, LAYERS = 4, 2, 16, 8, 3
"""Of every model in `tests.cases.SIZES`."""
IDS = token_ids(batch=6, length=24)
HELD = [3]
"""The one window of six that is held back."""


def walk_through(model: PreTrainedModel, ids: Tensor = IDS) -> CalibrationWalk:
    return CalibrationWalk(LayerSource(model), ids)


def sources_of(model: PreTrainedModel) -> dict[int, SourceAttention]:
    source = LayerSource(model)
    return {layer: source.attention(layer) for layer in range(source.num_layers)}


def layer_inputs(model: PreTrainedModel, ids: Tensor = IDS) -> list[Tensor]:
    """The states before each layer and before the final norm, as the model itself has them."""
    found: list[Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, args: found.append(args[0]))
        for module in [*model.model.layers, model.model.norm]
    ]
    outputs = model(ids, output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    assert all(torch.equal(one, other) for one, other in zip(outputs[:-1], found, strict=False))
    return found


def states_after_attention(model: PreTrainedModel, layer: int, ids: Tensor = IDS) -> Tensor:
    """The states after a layer's attention, as the model itself has them."""
    found: list[Tensor] = []
    norm = model.model.layers[layer].post_attention_layernorm
    hook = norm.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    model(ids)
    hook.remove()
    return found[0]


def disturbed(model: PreTrainedModel, layer: int, noise: float = 0.3) -> PreTrainedModel:
    """A copy in which one layer's attention has other weights."""
    clone = copy.deepcopy(model)
    for parameter in clone.model.layers[layer].self_attn.parameters():
        parameter.add_(noise * parameter.std() * torch.randn_like(parameter))
    return clone


class Walked:
    """A model whose layer 0 was replaced by another attention, the walk before layer 1, and what each sees there."""

    def __init__(self, family: str, ids: Tensor = IDS) -> None:
        self.ids = ids
        self.model = source_model(family, torch.float64)
        self.changed = disturbed(self.model, 0)
        self.walk = walk_through(self.model, ids)
        self.walk.advance(self.changed.model.layers[0].self_attn)
        self.calibration = LayerCalibration(self.walk, sources_of(self.model)[1])
        self.layer: Any = self.model.model.layers[1]
        self.converted = layer_inputs(self.changed, ids)[1]
        sizes = states_after_attention(self.model, 1, ids).square().mean(-1)
        self.row_weights = 1 / sizes / (1 / sizes).mean()  # [N, L]


class Heads:
    """One window at one layer, head by head: queries, keys and values, and what the attention does with them."""

    def __init__(self, walked: Walked, window: int) -> None:
        model, attention = walked.model, walked.layer.self_attn
        self.x = walked.layer.input_layernorm(walked.converted[window])
        length = len(self.x)
        query, key, value = (
            getattr(attention, f"{name}_proj")(self.x).view(length, -1, HEAD_DIM).transpose(0, 1) for name in "qkv"
        )
        self.raw_key, self.key_factor = key, torch.ones(GROUPS, length, dtype=torch.float64)
        if hasattr(attention, "q_norm"):
            query = normed(attention.q_norm, query)
            self.key_factor = (key.square().mean(-1) + attention.k_norm.variance_epsilon).rsqrt()
            self.raw_key = key * attention.k_norm.weight
            key = normed(attention.k_norm, key)
        self.query, self.key, self.value = query, key, value
        cos, sin = model.model.rotary_emb(self.x[None], torch.arange(length)[None])
        self.turn = torch.complex(cos, sin)[0, :, :PAIRS].to(torch.complex128)  # [L, D/2]
        self.factor = float(self.turn[0, 0].abs())
        window_size = getattr(model.config, "sliding_window", None)
        self.weights = torch.zeros(HEADS, length, length, dtype=torch.float64)
        for head in range(HEADS):
            turned_query, turned_key = pairs(query[head]) * self.turn, pairs(key[head // 2]) * self.turn
            for t in range(length):
                first = 0 if window_size is None else max(0, t - window_size + 1)
                logits = (turned_query[t].conj() * turned_key[first : t + 1]).real.sum(-1) / HEAD_DIM**0.5
                self.weights[head, t, first : t + 1] = logits.softmax(-1)

    def spread(self, output: Tensor, head: int, t: int) -> float:
        """Variance of what the values add to the state."""
        added = self.value[head // 2] @ output[:, head * HEAD_DIM : (head + 1) * HEAD_DIM].T  # [L, d]
        weights = self.weights[head, t]
        mean = weights @ added
        return float(weights @ (added - mean).square().sum(-1))


def normed(norm: Any, heads: Tensor) -> Tensor:
    """Heads [..., D] after an RMSNorm in their own dtype; Transformers' norms compute in float32."""
    return heads * (heads.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt() * norm.weight


def pairs(heads: Tensor) -> Tensor:
    """Half-split dims [..., D] as complex pairs."""
    return torch.complex(heads[..., :PAIRS], heads[..., PAIRS:])
