"""GQA2MLA is the source model at full rank, and TransMLA's factors below it."""

from __future__ import annotations

import pytest
import torch

from optimum_mla import GQA2MLA
from optimum_mla.measure.memory import bytes_per_token
from tests.cases import FAMILIES, SIZES, source_model, token_ids


@pytest.mark.compat
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_is_the_source_model(family: str, dtype: torch.dtype) -> None:
    source, ids = source_model(family, dtype), token_ids()
    with torch.no_grad():
        expected = source(ids).logits
    transformation = GQA2MLA()
    converted = transformation(source, copy=True)
    with torch.no_grad():
        difference = (converted(ids).logits - expected).abs().max().item()
    # Transformers' RMSNorms compute in float32 in a float64 model too.
    limit = {torch.float32: 1e-4, torch.float64: 1e-5, torch.bfloat16: 0.03 * expected.abs().max().item()}[dtype]
    assert difference <= limit
    assert transformation.preserves_computation
    assert converted.dtype == dtype
    assert converted.geometry.cache_ratio == 1
    if "window" not in family:
        assert bytes_per_token(converted, ids[:1]).live == bytes_per_token(source, ids[:1]).live


@pytest.mark.compat
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_full_rank_generates_the_source_tokens(family: str) -> None:
    source, ids = source_model(family), token_ids(2, 8)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(GQA2MLA()(source, copy=True).generate(ids, **options), source.generate(ids, **options))


def test_every_query_head_gets_maps_of_its_own() -> None:
    source = source_model("qwen2")
    converted = GQA2MLA()(source, copy=True)
    d, heads, dim = SIZES["hidden_size"], SIZES["num_attention_heads"], SIZES["head_dim"]
    groups = SIZES["num_key_value_heads"]
    # Two up-projections more per layer, and the biases of G heads become those of H.
    added = 2 * (groups * dim * heads * dim + (heads - groups) * dim)
    assert converted.num_parameters() - source.num_parameters() == SIZES["num_hidden_layers"] * added
    attention = converted.model.layers[0].self_attn
    assert attention.k_a_proj.weight.shape == (groups * dim, d)
    assert attention.k_b_proj.weight.shape == (heads * dim, groups * dim)


def test_factors_are_those_of_the_replicated_weight() -> None:
    source = source_model("llama", torch.float64)
    key = source.model.layers[1].self_attn.k_proj.weight.detach()
    share = SIZES["num_attention_heads"] // SIZES["num_key_value_heads"]
    replicated = key.view(-1, SIZES["head_dim"], key.shape[1]).repeat_interleave(share, dim=0).flatten(0, 1)
    left, spectrum, _ = torch.linalg.svd(replicated)
    attention = GQA2MLA(kv_lora_rank=24)(source).model.layers[1].self_attn
    down, up = attention.k_a_proj.weight.detach(), attention.k_b_proj.weight.detach()
    assert down.shape[0] == 12
    assert torch.allclose(
        up @ down, left[:, :12] * spectrum[:12] @ (left[:, :12] * spectrum[:12]).pinverse() @ replicated
    )
    # W_K^a = U √S and W_K^b = √S Vᵀ: both sides have the roots of the singular values as norms.
    assert torch.allclose(down.norm(dim=1), spectrum[:12].sqrt())
    assert torch.allclose(up.norm(dim=0), spectrum[:12].sqrt())


def test_both_latents_share_the_rank() -> None:
    converted = GQA2MLA(kv_lora_rank=31)(source_model("llama"))
    assert {(g.k_lora_rank, g.v_lora_rank) for g in converted.geometry.layers} == {(15, 16)}


@pytest.mark.parametrize(
    ("options", "preserves"),
    [({}, True), ({"kv_cache_ratio": 1.0}, True), ({"energy": 1.0}, True), ({"kv_cache_ratio": 0.99}, False)],
)
def test_says_whether_it_preserves_the_computation(options: dict[str, float], preserves: bool) -> None:
    assert GQA2MLA(**options).preserves_computation is preserves
