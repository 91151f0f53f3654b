"""Vectors at rest against the same operations on plain tensors, and what they weigh."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from optimum_mla.cache.backends import make_backend
from optimum_mla.cache.stored import DenseStored, QuantizedStored, Stored, balanced_group

KINDS = [("hqq", 8), ("hqq", 4), ("hqq", 3), ("hqq", 2), ("quanto", 8), ("quanto", 4), ("quanto", 2)]
shapes = {
    "kind": st.sampled_from(KINDS),
    "width": st.integers(1, 150),
    "group_size": st.integers(2, 20).map(lambda n: 4 * n),
    "batch": st.integers(1, 3),
    "tokens": st.integers(1, 9),
    "seed": st.integers(0, 2**20),
}


def vectors_of(batch: int, tokens: int, width: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def quantize(vectors: Tensor, kind: tuple[str, int], group_size: int) -> QuantizedStored:
    return QuantizedStored.quantize(vectors, make_backend(*kind), group_size)


def dense(stored: DenseStored | QuantizedStored) -> Tensor:
    return stored.open().dense()


def weight(stored: Stored) -> int:
    """Bytes behind its tensors; a view would count whole."""
    return sum(tensor.untyped_storage().nbytes() for tensor in stored.tensors)


@given(**shapes)
def test_vectors_come_back_within_a_step(
    kind: tuple[str, int], width: int, group_size: int, batch: int, tokens: int, seed: int
) -> None:
    vectors = vectors_of(batch, tokens, width, seed)
    stored = quantize(vectors, kind, group_size)
    assert (stored.batch, stored.tokens) == (batch, tokens)
    back = dense(stored)
    assert back.shape == vectors.shape
    group = balanced_group(width, group_size)
    assert group % 4 == 0
    assert group <= group_size
    for start in range(0, width, group):
        part = vectors[..., start : start + group]
        if kind == ("quanto", 8):
            step = 2 * part.abs().amax(-1) / 255
        else:
            step = (part.amax(-1) - part.amin(-1)) / (2 ** kind[1] - 1)
        errors = (back[..., start : start + group] - part).abs().amax(-1)
        assert (errors <= 0.52 * step + 2.0**-9 * part.abs().amax(-1)).all()


@given(**shapes)
def test_tokens_and_rows_move_as_in_a_plain_tensor(
    kind: tuple[str, int], width: int, group_size: int, batch: int, tokens: int, seed: int
) -> None:
    vectors = vectors_of(batch, tokens, width, seed)
    split, stop = seed % (tokens + 1), max(1, tokens - seed % 3)
    indices = torch.tensor([batch - 1, 0, batch - 1])
    plain = dense(quantize(vectors, kind, group_size))
    for stored, expected in ((quantize(vectors, kind, group_size), plain), (DenseStored(vectors), vectors)):
        assert torch.equal(dense(stored.cut(0, stop)), expected[:, :stop])
        assert torch.equal(dense(stored.rows(indices)), expected[indices])
        assert torch.equal(dense(stored.to(torch.device("cpu"))), expected)
        if 0 < split < tokens:
            older, newer = stored.cut(0, split), stored.cut(split, tokens)
            assert torch.equal(dense(newer), expected[:, split:])
            assert torch.equal(dense(older.joined(newer)), expected)
            assert weight(older) + weight(newer) == weight(stored)
            # Quantized apart and joined is quantized together: no token knows of another.
            again = [quantize(part, kind, group_size) for part in (vectors[:, :split], vectors[:, split:])]
            assert torch.equal(dense(again[0].joined(again[1])), plain)


@given(**shapes)
def test_products_are_those_of_the_dense_vectors(
    kind: tuple[str, int], width: int, group_size: int, batch: int, tokens: int, seed: int
) -> None:
    vectors = vectors_of(batch, tokens, width, seed)
    for stored in (quantize(vectors, kind, group_size), DenseStored(vectors)):
        latents, plain = stored.open(), dense(stored)
        queries, weights = vectors_of(batch, 5, width, seed + 1), vectors_of(batch, 5, tokens, seed + 2)
        matrix, bias = vectors_of(1, 7, width, seed + 3)[0], vectors_of(1, 1, 7, seed + 4)[0, 0]
        pairs = [
            (latents.logits(queries), torch.einsum("bmw,btw->bmt", queries, plain)),
            (latents.context(weights), torch.einsum("bmt,btw->bmw", weights, plain)),
            (latents.project(matrix, None), torch.einsum("nw,btw->btn", matrix, plain)),
            (latents.project(matrix, bias), torch.einsum("nw,btw->btn", matrix, plain) + bias),
        ]
        for got, expected in pairs:
            assert got.shape == expected.shape
            # Relative to the largest sum of that many terms.
            assert (got - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())


@given(**shapes)
def test_bytes_are_codes_and_parameters_and_nothing_else(
    kind: tuple[str, int], width: int, group_size: int, batch: int, tokens: int, seed: int
) -> None:
    bits = kind[1]
    stored = quantize(vectors_of(batch, tokens, width, seed), kind, group_size)
    group = balanced_group(width, group_size)
    groups = math.ceil(width / group)
    code_bits = 32 * math.ceil(groups * group / 10) if bits == 3 else bits * groups * group
    parameter_bits = groups * (16 if kind == ("quanto", 8) else 32)
    assert 8 * weight(stored) == batch * tokens * (code_bits + parameter_bits)
    assert groups <= math.ceil(width / group_size)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_per_number_where_groups_are_full(kind: tuple[str, int], group_size: int, dtype: torch.dtype) -> None:
    bits = kind[1]
    vectors = vectors_of(2, 50, 4 * group_size, 0, dtype)
    per_number = 8 * weight(quantize(vectors, kind, group_size)) / vectors.numel()
    codes = 32 * math.ceil(4 * group_size / 10) / (4 * group_size) if bits == 3 else bits
    parameters = 16 if kind == ("quanto", 8) else 32
    assert per_number == pytest.approx(codes + parameters / group_size, rel=1e-12)
    if bits in (2, 4):
        assert per_number == pytest.approx(bits + 32 / group_size, rel=0.01)


def test_nothing_keeps_dropped_tokens_alive() -> None:
    vectors = vectors_of(3, 100, 48, 0)
    for stored in (quantize(vectors, ("hqq", 4), 16), DenseStored(vectors)):
        per_token = weight(stored) / 300
        assert weight(stored.cut(10, 11)) == 3 * per_token
        assert weight(stored.cut(0, 50).rows(torch.tensor([1]))) == 50 * per_token
        assert weight(stored.cut(0, 0)) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_16_bit_models_get_their_dtype_back(kind: tuple[str, int], dtype: torch.dtype) -> None:
    vectors = vectors_of(2, 6, 52, 1, dtype)
    latents = quantize(vectors, kind, 24).open()
    assert latents.dense().dtype == dtype
    expected = torch.einsum("bmw,btw->bmt", vectors.float(), latents.dense().float())
    assert latents.logits(vectors).dtype == torch.float32
    assert (latents.logits(vectors) - expected).abs().max() <= 0.01 * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [16, 40])
def test_a_lone_token_opens(width: int, kind: tuple[str, int]) -> None:
    """One row and one token in one or more groups, as at the start of a block."""
    vectors = vectors_of(1, 3, width, 0)
    alone, together = quantize(vectors[:, 1:2], kind, 16), quantize(vectors, kind, 16)
    assert torch.equal(dense(alone), dense(together)[:, 1:2])
    assert torch.equal(dense(alone.joined(alone)), dense(together)[:, [1, 1]])
