"""What 16 bits cost the context of a layer, with biases in the keys that shift all logits of a query alike."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from optimum_mla import models
from optimum_mla.nn import LatentAttention
from optimum_mla.nn.attention import eager_attention
from optimum_mla.ops.blocks import TensorView
from optimum_mla.ops.rotary import AbsoluteFrames, RotaryFrames, Rotation
from tests.cases import SIZES

HEADS, GROUPS, HEAD_DIM, NOPE, RANK, TOKENS = 8, 2, 64, 48, 64, 700
DECOUPLED: dict[str, Any] = {
    "attention_form": "decoupled",
    "kv_lora_rank": RANK,
    "qk_nope_head_dim": NOPE,
    "qk_rope_head_dim": HEAD_DIM - NOPE,
    "v_head_dim": HEAD_DIM,
    "num_up_heads": GROUPS,
    "latent_bias": True,
}
FORMS: dict[str, dict[str, Any]] = {
    "shared rotary key": DECOUPLED,
    "rotary key per head": {**DECOUPLED, "num_rope_heads": GROUPS},
    "rotary key rebuilt": {**DECOUPLED, "rope_cache": "rebuilt"},
}
PATHS = ("reference", "kernel", "blockwise", "eager")
SHARE = 0.37
"""Largest error of a context, in units of the spacing of 16-bit numbers at 1. It was 0.4 to 1.2 with rounded logits."""


class Step:
    """One decoding step of a layer whose weights, queries and cached vectors are numbers of 16 bits.

    Args:
        form: Name of the layer's form.
        dtype: The dtype whose numbers they are.
        bias: Size that the bias of the keys adds to each logit.
        cap: Soft-cap of the logits, or None.
    """

    def __init__(self, form: str, dtype: torch.dtype, bias: float, cap: float | None = None) -> None:
        torch.manual_seed(0)
        sizes = {"hidden_size": 256, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "head_dim": HEAD_DIM}
        config = models.LlamaMLAConfig(**{**SIZES, **sizes, **FORMS[form], "num_hidden_layers": 1})
        self.attention: Any = models.LlamaMLAForCausalLM(config).eval().double().model.layers[0].self_attn
        g = self.attention.geometry = replace(self.attention.geometry, logit_cap=cap)
        common = torch.randn(GROUPS, 1, HEAD_DIM).double()
        queries = common.repeat_interleave(HEADS // GROUPS, 0)[None] + torch.randn(1, HEADS, 1, HEAD_DIM)
        up = self.attention.kv_b_proj
        for module in (up, getattr(self.attention, "k_rope_proj", None)):
            if module is not None:
                module.weight.data.normal_(std=1.5 * RANK**-0.5)
                module.bias.data.normal_()
        key_bias, direction = up.bias.data.view(GROUPS, -1)[:, :NOPE], common[:, 0, :NOPE]
        key_bias.copy_(bias / self.attention.scaling * direction / direction.square().sum(-1, keepdim=True))
        cached = torch.randn(1, 1, TOKENS, RANK), torch.randn(1, 1, TOKENS, g.cached_width(1))
        angles = torch.randn(1, 1, TOKENS, g.qk_rope_head_dim // 2)
        rounded = [tensor.to(dtype).double() for tensor in (queries, *cached, angles.cos(), angles.sin())]
        self.queries, self.first, self.second = rounded[:3]
        self.turns = Rotation(*rounded[3:])
        for parameter in self.attention.parameters():
            parameter.data = parameter.data.to(dtype).double()

    def context(self, path: str, dtype: torch.dtype) -> Tensor:
        """Return the context of the step by one of `PATHS`, computed in a dtype."""
        attention: LatentAttention = self.attention.to(dtype)
        view = TensorView(self.first.to(dtype), self.second.to(dtype), 0)
        queries, turns = self.queries.to(dtype), Rotation(*(part.to(dtype) for part in self.turns))
        frames: RotaryFrames | None = None
        if attention.needs_cached_positions():
            frames = AbsoluteFrames(turns.at, turns.at(slice(TOKENS - 1, TOKENS)))
        # With gradients the reference runs, which also computes on GPUs.
        with torch.set_grad_enabled(path == "reference"):
            if path in ("reference", "kernel"):
                return attention._absorbed(queries, view, frames, None, False)[0].detach().double()
            if path == "blockwise":
                return attention._expanded(queries, view, frames, None, False)[0].double()
            if frames is not None:
                queries = attention._rotate_queries(queries, frames.query(slice(0)))
            keys, values = attention._expand(view.whole(), None if frames is None else turns)
            cap, scaling = attention.geometry.logit_cap, attention.scaling
            return eager_attention(attention, queries, keys, values, None, scaling, softcap=cap)[0].double()

    def error(self, path: str, dtype: torch.dtype) -> float:
        """Return the error of a context relative to that in float64."""
        exact = self.context(path, torch.float64)
        return float((self.context(path, dtype) - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("form", FORMS)
def test_a_bias_that_softmax_does_not_see_costs_nothing(form: str, path: str, dtype: torch.dtype) -> None:
    errors = [Step(form, dtype, bias).error(path, dtype) for bias in (0.0, 23.0)]
    assert errors[1] == errors[0] <= SHARE * torch.finfo(dtype).eps


@pytest.mark.parametrize("path", PATHS)
def test_a_bias_under_a_soft_cap_is_kept(path: str) -> None:
    plain, biased = (Step("shared rotary key", torch.bfloat16, bias, cap=50.0) for bias in (0.0, 23.0))
    contexts = [step.context(path, torch.float64) for step in (plain, biased)]
    assert (contexts[0] - contexts[1]).norm() > 0.1 * contexts[0].norm()
    assert biased.error(path, torch.bfloat16) <= torch.finfo(torch.bfloat16).eps
