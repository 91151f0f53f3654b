"""Norms on the latents of a converted model, fitted to a text layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from optimum_mla import GQA2MLA, MHA2MLA, XEcoMLA
from optimum_mla.calibrate.windows import deciding, fitted
from optimum_mla.core.errors import MLAError
from optimum_mla.export.latent_norm import with_latent_norms
from optimum_mla.measure.quality import perplexity
from tests.cases import source_model, token_ids

IDS = token_ids(8, 24)


def converted(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    method = GQA2MLA(kv_cache_ratio=0.75, rope_cache="cached", shared_rope=True, calibration=IDS, heal=False, **options)
    return method(source_model("llama", dtype))


@torch.no_grad()
def test_the_norm_is_real_the_biases_are_gone_and_the_model_stays() -> None:
    model = converted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    normed = with_latent_norms(model, IDS)
    assert normed.model is not model
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    for layer, other in zip(normed.model.model.layers, model.model.layers, strict=True):
        attention = layer.self_attn
        assert type(attention.kv_a_layernorm) is nn.RMSNorm
        assert attention.kv_b_proj.bias is None
        assert other.self_attn.kv_b_proj.bias is not None
        assert torch.equal(attention.q_proj.weight, other.self_attn.q_proj.weight)
    assert normed.model.config.latent_norm is True
    assert normed.model.geometry.cache_ratio == model.geometry.cache_ratio
    held = IDS[deciding(len(IDS))]
    assert normed.perplexities == pytest.approx((perplexity(model, held), perplexity(normed.model, held)), rel=1e-3)


@torch.no_grad()
def test_the_fit_of_the_first_layer_is_that_of_least_squares() -> None:
    model = converted(torch.float64)
    normed = with_latent_norms(model, IDS).model
    old, new = (one.model.layers[0].self_attn for one in (model, normed))
    states = model.model.layers[0].input_layernorm(model.model.embed_tokens(IDS))
    latents = old.kv_a_proj_with_mqa(states)[..., : old.geometry.kv_lora_rank]
    size = latents.square().mean(-1).sqrt()
    assert torch.allclose(new.kv_a_layernorm.weight, size[fitted(len(IDS))].median().expand(latents.shape[-1]))

    def error(weight: torch.Tensor, windows: torch.Tensor) -> float:
        off = nn.functional.linear(new.kv_a_layernorm(latents), weight) - old.kv_b_proj(latents)
        return float((off / size[..., None])[windows].square().mean())

    held = deciding(len(IDS))
    assert error(new.kv_b_proj.weight, held) < 0.9 * error(old.kv_b_proj.weight, held)


def test_a_text_that_repeats_is_fitted_to_a_smaller_error() -> None:
    ids = token_ids(1, 24).repeat(8, 1)
    ids[-1, -1] += 1 if ids[-1, -1] == 0 else -1  # windows that are all the same are refused
    method = GQA2MLA(kv_cache_ratio=1.0, rope_cache="cached", shared_rope=True, calibration=ids)
    model = method(source_model("llama"))
    plain = with_latent_norms(model, IDS).model
    fit = with_latent_norms(model, ids).model
    with torch.no_grad():
        expected = model(ids[:1]).logits
        errors = [float((one(ids[:1]).logits - expected).square().mean()) for one in (fit, plain)]
    assert errors[0] < 0.5 * errors[1]


REFUSED: dict[str, Callable[[], Any]] = {
    "has no cached rotary key": lambda: GQA2MLA(kv_cache_ratio=0.5, calibration=IDS)(source_model("llama")),
    "has a norm on its latent already": lambda: converted(latent_norm=True),
    "belongs to a family with biases on keys and values": lambda: XEcoMLA(kv_cache_ratio=0.5, calibration=IDS)(
        source_model("qwen2")
    ),
    "has a latent for queries": lambda: XEcoMLA(kv_cache_ratio=0.5, q_lora_rank=20, calibration=IDS)(
        source_model("llama")
    ),
    "1 to 96|0 to 96": lambda: converted(),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_has_no_place_for_a_norm_is_refused_with_the_reason(said: str) -> None:
    ids = IDS + 1000 if "96" in said else IDS
    with pytest.raises(MLAError, match=said):
        with_latent_norms(REFUSED[said](), ids)


def test_rotary_keys_per_head_can_have_norms_too() -> None:
    model = MHA2MLA(kv_cache_ratio=0.5, calibration=IDS)(source_model("llama"))
    assert with_latent_norms(model, IDS).model.geometry.layers[0].latent_norm
