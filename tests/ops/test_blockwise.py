"""Attention block by block against attention in one piece."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optimum_mla.ops import blocks
from optimum_mla.ops.blocks import TensorView
from optimum_mla.ops.blockwise import LatentDecode, RotaryRebuild, latent_decode, masked_softmax
from optimum_mla.ops.kernels import cpu_decode
from optimum_mla.ops.rotary import AbsoluteFrames, Rotation, rotate

B, H, R, RANK, SCALING = 2, 4, 6, 10, 0.3


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def turns(rope_heads: int, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin of random angles."""
    angles = randn(1, rope_heads, length, R // 2, seed=10)
    return angles.cos(), angles.sin()


def plain(step: LatentDecode, rope_key: Tensor) -> tuple[Tensor, Tensor]:
    """Context and weights by einsums over the whole cache."""
    whole = step.view.whole()
    logits = torch.einsum("bhsr,btr->bhst", step.latent_queries, whole.first.dense())
    key = rope_key.repeat_interleave(H // step.rope_heads, dim=1)
    rope = step.rope_queries if step.rebuild is None else rotate(step.rope_queries, step.rebuild.frames.query(slice(0)))
    logits = logits + torch.einsum("bhsr,bhtr->bhst", rope, key)
    if step.logit_bias is not None:
        logits = logits + step.logit_bias
    if whole.key_factors.shape[-1]:
        factors = whole.key_factors.transpose(1, 2).repeat_interleave(H // whole.key_factors.shape[-1], dim=1)
        logits = logits * factors[:, :, None]
    weights = masked_softmax(logits * step.scaling, step.mask)
    return torch.einsum("bhst,btr->bhsr", weights, whole.first.dense()), weights


@given(
    length=st.integers(1, 5),
    past=st.integers(0, 40),
    block=st.integers(1, 17),
    rope_heads=st.sampled_from([1, 2, 4]),
    key_factors=st.sampled_from([0, 2]),
    biased=st.booleans(),
    mask_kind=st.sampled_from(["none", "boolean", "additive", "minus infinity"]),
    rebuilt=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_blocks_give_what_one_piece_gives(
    length: int, past: int, block: int, rope_heads: int, key_factors: int, biased: bool, mask_kind: str, rebuilt: bool
) -> None:
    tokens = past + length
    first, flat = randn(B, 1, tokens, RANK, seed=1), randn(B, 1, tokens, rope_heads * R, seed=2)
    factors = randn(B, 1, tokens, key_factors, seed=3).abs() + 0.5
    rope_key, rebuild, second = flat[:, 0].unflatten(-1, (rope_heads, R)).transpose(1, 2), None, flat
    if rebuilt:
        weight, bias = randn(rope_heads * R, RANK, seed=4), randn(rope_heads * R, seed=5)
        angles = randn(1, rope_heads, tokens, R // 2, seed=6)
        turned, queries_turned = Rotation(angles.cos(), angles.sin()), Rotation(*turns(rope_heads, length))
        rebuild = RotaryRebuild(weight, bias, AbsoluteFrames(turned.at, queries_turned))
        made = (first[:, 0] @ weight.T + bias).unflatten(-1, (rope_heads, R)).transpose(1, 2)
        rope_key, second = rotate(made, turned), flat[..., :0]
    mask = None
    if mask_kind != "none":
        allowed = torch.ones(length, tokens, dtype=torch.bool).tril(past)[None, None].expand(B, 1, -1, -1).clone()
        allowed[0, :, :, : min(past, 3)] = False
        lowest = -torch.inf if mask_kind == "minus infinity" else torch.finfo(torch.float64).min
        additive = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, lowest)
        mask = allowed if mask_kind == "boolean" else additive
    step = LatentDecode(
        latent_queries=randn(B, H, length, RANK, seed=7),
        rope_queries=randn(B, H, length, R, seed=8),
        logit_bias=randn(B, H, length, 1, seed=9) if biased and key_factors else None,
        scaling=SCALING,
        rope_heads=rope_heads,
        view=TensorView(first, torch.cat([second, factors], dim=-1), key_factors),
        rebuild=rebuild,
        mask=mask,
        keep_weights=True,
    )
    context, weights = plain(step, rope_key)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(blocks, "block_tokens", lambda width: block)
        attended = latent_decode(step)
        fused = cpu_decode(replace(step, keep_weights=False))
    assert attended.weights is not None
    assert (attended.context - context).abs().max() <= 1e-12
    assert (attended.weights - weights).abs().max() <= 1e-12
    assert (attended.mass - 1).abs().max() <= 1e-12
    # The fused kernel's sums are float32.
    assert (fused.context - context).abs().max() <= 1e-5
    assert (fused.mass - 1).abs().max() <= 1e-5


def test_a_row_that_sees_nothing_in_the_first_block_is_not_disturbed_by_it() -> None:
    tokens = 2 * blocks.block_tokens(RANK)
    first, second = 5 * randn(B, 1, tokens, RANK), randn(B, 1, tokens, R)
    allowed = torch.ones(B, 1, 1, tokens, dtype=torch.bool)
    allowed[0, ..., : blocks.block_tokens(RANK) + 3] = False

    def context(tensors: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        queries = randn(B, H, 1, RANK, seed=7), randn(B, H, 1, R, seed=8)
        view = TensorView(*tensors, 0)
        return latent_decode(LatentDecode(*queries, None, SCALING, 1, view, None, mask)).context

    expected = context((first, second), allowed)
    changed = first.clone()
    changed[0, :, : blocks.block_tokens(RANK)] = 1e6
    assert torch.equal(context((changed, second), allowed)[0], expected[0])
    assert not torch.equal(context((changed, second), allowed)[1:], expected[:1])
    assert expected[0].abs().max() > 0.1


def test_boolean_and_additive_masks_agree() -> None:
    logits, allowed = randn(B, H, 4, 9), torch.ones(4, 9, dtype=torch.bool).tril(5)[None, None]
    additive = torch.zeros(1, 1, 4, 9, dtype=torch.float64).masked_fill(~allowed, torch.finfo(torch.float64).min)
    by_bool, by_sum = masked_softmax(logits, allowed), masked_softmax(logits, additive)
    assert torch.equal(by_bool, by_sum)
    assert (by_bool[..., 0, 6:] == 0).all()
    assert torch.allclose(by_bool.sum(-1), torch.ones(B, H, 4, dtype=torch.float64))
