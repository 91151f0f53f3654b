"""Latent-space attention against plain einsums."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_mla.ops import absorb

B, H, U, S, T, R, V = 2, 6, 3, 4, 9, 5, 7


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_logits_and_context() -> None:
    query, grouped = randn(B, H, S, R), randn(B, U, T, R)
    repeated = grouped.repeat_interleave(H // U, dim=1)
    assert torch.allclose(absorb.grouped_logits(query, grouped), torch.einsum("bhsr,bhtr->bhst", query, repeated))
    weights = randn(B, H, S, T)
    assert torch.allclose(absorb.grouped_context(weights, grouped), torch.einsum("bhst,bhtr->bhsr", weights, repeated))


def test_a_weighted_sum_of_latents_up_projects_to_that_of_the_values() -> None:
    weights, latent, up, bias = 0.7 * randn(B, H, S, T).softmax(-1), randn(B, T, R), randn(U, V, R), randn(U, V)
    values = torch.einsum("btr,uvr->butv", latent, up) + bias[:, None]
    expected = torch.einsum("bhst,bhtv->bhsv", weights, values.repeat_interleave(H // U, dim=1))
    context, mass = torch.einsum("bhst,btr->bhsr", weights, latent), weights.sum(-1, keepdim=True)
    assert torch.allclose(absorb.up_projected_context(context, mass, up, bias), expected)
    without = torch.einsum("bhst,bhtv->bhsv", weights, (values - bias[:, None]).repeat_interleave(H // U, dim=1))
    assert torch.allclose(absorb.up_projected_context(context, mass, up, None), without)


@given(
    queries=st.integers(1, 600),
    tokens=st.integers(1, 4000),
    rank=st.integers(1, 600),
    groups=st.integers(1, 8),
    dim=st.integers(1, 128),
)
def test_choice_follows_the_count(queries: int, tokens: int, rank: int, groups: int, dim: int) -> None:
    heads, up_heads = 8, 8 // groups if 8 % groups == 0 else 8
    key_side = absorb.absorbing_saves(queries, tokens, rank, heads, up_heads, dim, 0)
    expand = tokens * rank * up_heads * dim + heads * queries * tokens * dim
    latent = queries * heads * rank * dim + heads * queries * tokens * rank
    assert key_side == (latent < expand)


def test_decode_absorbs_and_prefill_expands() -> None:
    llama_2_7b = {"heads": 32, "up_heads": 32, "key_dim": 112, "value_dim": 128}
    assert absorb.absorbing_saves(1, 8192, 512, **llama_2_7b)
    assert not absorb.absorbing_saves(8192, 8192, 512, **llama_2_7b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [8, 512, 600])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_products_of_16_bits(dtype: torch.dtype, tokens: int, batch: tuple[int, ...]) -> None:
    left, right = randn(*batch, 3, tokens).to(dtype), randn(*batch, tokens, 64).to(dtype)
    exact = left.double() @ right.double()
    logits = absorb.logit_product(left, right)
    assert logits.dtype is torch.float32
    assert (logits.double() - exact).abs().max() <= 1e-5 * exact.abs().max()
    # Codes are opened in float32, and weights are in float32 in any case.
    opened = absorb.weighted_sum(left.float(), right.float())
    assert opened.dtype is torch.float32
    assert (opened.double() - exact).abs().max() <= 1e-5 * exact.abs().max()
    found = absorb.weighted_sum(left.float(), right)
    assert found.dtype is absorb.working_dtype(dtype, right.device, tokens)
    assert (found.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("amx", [True, False])
@pytest.mark.parametrize("avx512", [True, False])
def test_only_16_bits_on_a_cpu_are_computed_in_another_dtype(
    monkeypatch: pytest.MonkeyPatch, amx: bool, avx512: bool
) -> None:
    monkeypatch.setattr(absorb, "_has", {"_is_amx_tile_supported": amx, "_is_avx512_bf16_supported": avx512}.get)
    cpu, other = torch.device("cpu"), torch.device("meta")
    for of in (absorb.working_dtype, absorb.attention_dtype):
        for dtype in (torch.float32, torch.float64):
            assert of(dtype, cpu, 8) is dtype
        for dtype in (torch.bfloat16, torch.float16):
            assert of(dtype, cpu, 8) is of(dtype, cpu, 600) is torch.float32
            assert of(dtype, other, 8) is dtype
    # Products over whole multiples of tokens take the instructions that there are.
    assert absorb.working_dtype(torch.bfloat16, cpu, 512) is (torch.bfloat16 if amx or avx512 else torch.float32)
    assert absorb.working_dtype(torch.float16, cpu, 512) is (torch.float16 if amx else torch.float32)
    assert absorb.attention_dtype(torch.bfloat16, cpu, 512) is (torch.bfloat16 if amx else torch.float32)


def test_compiled_products_hold_for_any_number_of_tokens() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(absorb.grouped_logits, dynamic=True, fullgraph=True, backend="eager")
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for tokens in (8, 9, 256, 300, 512):
        query, keys = randn(B, H, S, R).float(), randn(B, U, tokens, R).float()
        assert torch.equal(compiled(query, keys), absorb.grouped_logits(query, keys))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1


def test_keys_dim_by_dim_give_the_same_logits() -> None:
    query, keys = randn(B, H, S, R), randn(B, U, T, R)
    by_dim = keys.mT.contiguous().mT
    assert absorb.is_transposed(by_dim)
    assert torch.allclose(absorb.grouped_logits(query, by_dim), absorb.grouped_logits(query, keys), atol=1e-12)
