"""The kernel for CPUs agrees with the reference however the cache stores its blocks, and decoding calls it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from optimum_mla import MHA2MLA
from optimum_mla.cache import CacheSettings, LatentLayer
from optimum_mla.core.geometry import MLAGeometry
from optimum_mla.ops import kernels
from optimum_mla.ops.blockwise import Attended, LatentDecode, RotaryRebuild, latent_decode
from optimum_mla.ops.kernels import cpu_decode, register_kernel
from optimum_mla.ops.rotary import AbsoluteFrames, Rotation
from optimum_mla.stack import cache_argument
from tests.cases import SIZES, source_model, token_ids

HEADS, ROPE, RANK = 4, 8, 40
STORED: dict[str, dict[str, Any]] = {
    "dense": {},
    "hqq 4": {"bits": 4, "residual_length": 8},
    "hqq 3": {"bits": 3, "residual_length": 0},
    "hqq 8, rotary 8": {"bits": 8, "residual_length": 5, "rope_bits": 8},
    "quanto 4": {"bits": 4, "backend": "quanto", "residual_length": 8},
    "quanto 8, rotary 8": {"bits": 8, "backend": "quanto", "residual_length": 0, "rope_bits": 8},
    "only rotary": {"rope_bits": 8, "residual_length": 4},
}


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def step_over(
    stored: str, rope: str, length: int, mask: bool, dtype: torch.dtype, tokens: int = 90, batch: int = 2
) -> LatentDecode:
    """A step over a cache of `tokens` tokens in several blocks."""
    rope_heads = 2 if rope == "per head" else 1
    rebuilt = rope == "rebuilt"
    geometry = MLAGeometry(
        hidden_size=64, num_attention_heads=HEADS, num_key_value_heads=2, head_dim=16, attention_form="decoupled",
        kv_lora_rank=RANK, qk_nope_head_dim=8, qk_rope_head_dim=ROPE, num_rope_heads=rope_heads,
        rope_cache="rebuilt" if rebuilt else "cached",
    )  # fmt: skip
    layer = LatentLayer(geometry, CacheSettings(**{"group_size": 16, **STORED[stored]}))
    layer.block_tokens = 32
    second = geometry.cache_numbers - RANK
    for start, stop in ((0, 50), (50, tokens - 1), (tokens - 1, tokens)):
        view = layer.append(
            randn(batch, 1, stop - start, RANK, seed=start, dtype=dtype),
            randn(batch, 1, stop - start, second, seed=start + 1, dtype=dtype),
        )
    rebuild = None
    if rebuilt:
        angles = randn(1, 1, tokens, ROPE // 2, seed=3)
        turns = Rotation(angles.cos().to(dtype), angles.sin().to(dtype))
        queries_turn = turns.at(slice(tokens - length, tokens))
        rebuild = RotaryRebuild(randn(ROPE, RANK, seed=4, dtype=dtype), None, AbsoluteFrames(turns.at, queries_turn))
    allowed = torch.ones(length, tokens, dtype=torch.bool).tril(tokens - length).expand(batch, 1, -1, -1).clone()
    allowed[0, ..., :7] = False
    return LatentDecode(
        latent_queries=randn(batch, HEADS, length, RANK, seed=5, dtype=dtype),
        rope_queries=randn(batch, HEADS, length, ROPE, seed=6, dtype=dtype),
        logit_bias=None,
        scaling=0.2,
        rope_heads=rope_heads,
        view=view,
        rebuild=rebuild,
        mask=allowed if mask else None,
    )


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("rope", ["shared", "per head", "rebuilt"])
@pytest.mark.parametrize("stored", STORED)
def test_the_fused_kernel_gives_what_the_reference_gives(
    stored: str, rope: str, length: int, mask: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "PIECE_NUMBERS", 8 * RANK)  # pieces in blocks this short, too
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    step = step_over(stored, rope, length, mask, torch.float32)
    with torch.no_grad():
        expected, got = latent_decode(step), cpu_decode(step)
    assert got.weights is None
    assert got.context.shape == expected.context.shape == (2, HEADS, length, RANK)
    assert (got.context - expected.context).abs().max() <= 1e-5 * expected.context.abs().max()
    assert (got.mass - expected.mass).abs().max() <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", STORED)
def test_16_bits(stored: str, dtype: torch.dtype) -> None:
    step = step_over(stored, "shared", 1, False, dtype)
    with torch.no_grad():
        expected, got = latent_decode(step), cpu_decode(step)
    bound = 0.02 if dtype == torch.bfloat16 else 0.003
    assert (got.context.float() - expected.context.float()).abs().max() <= bound * expected.context.abs().max()


def test_pieces_do_not_change_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    step = step_over("dense", "shared", 1, False, torch.float32)
    with torch.no_grad():
        whole = cpu_decode(step).context
        monkeypatch.setattr(kernels, "PIECE_NUMBERS", RANK)
        for threads in (1, 2, 7, 16):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            assert (cpu_decode(step).context - whole).abs().max() <= 1e-6


def decoded(change: Callable[[Attended], Attended] | None) -> tuple[Tensor, list[LatentDecode]]:
    """Logits [2, vocabulary] of one decoded token, and the steps that a registered kernel got.

    Args:
        change: What the registered kernel does to the reference's answer; None registers no kernel for CPUs.
    """
    steps: list[LatentDecode] = []

    def kernel(step: LatentDecode) -> Attended:
        steps.append(step)
        assert change is not None
        return change(latent_decode(step))

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(kernels, "_KERNELS", {})
        if change is not None:
            register_kernel("cpu", kernel)
        model, ids = MHA2MLA(kv_cache_ratio=0.5)(source_model("llama")), token_ids()
        cache = DynamicCache(config=model.config)
        model(ids[:, :-1], **cache_argument(model, cache))
        steps.clear()
        return model(ids[:, -1:], **cache_argument(model, cache)).logits[:, -1], steps


def test_decoding_calls_the_registered_kernel_and_uses_its_answer() -> None:
    reference, none = decoded(None)
    assert none == []
    same, steps = decoded(lambda attended: attended)
    assert [step.view.tokens for step in steps] == [token_ids().shape[1]] * SIZES["num_hidden_layers"]
    assert (same - reference).abs().max() <= 1e-5
    without_context, _ = decoded(lambda attended: attended._replace(context=torch.zeros_like(attended.context)))
    assert (without_context - reference).abs().max() > 1e-2


def test_cpus_decode_with_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    flash = kernels._flash
    monkeypatch.setattr(kernels, "_flash", lambda *arguments: calls.append(arguments) or flash(*arguments))
    model, ids = MHA2MLA(kv_cache_ratio=0.5)(source_model("llama")), token_ids()
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(ids[:, :-1], **cache_argument(model, cache))
        calls.clear()
        fused = model(ids[:, -1:], **cache_argument(model, cache)).logits[:, -1]
    assert len(calls) == SIZES["num_hidden_layers"]
    assert (fused - decoded(None)[0]).abs().max() <= 1e-5
