"""Products of grouped heads, and the rule that says when attention in latent space takes less work.

The latents are one head that all query heads share. They are never expanded along the heads: the heads fold into the
query length instead, so every product is one batched matrix product over the cache, which is not copied.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from optimum_mla.ops.rotary import is_transposed

WHOLE_TOKENS = 256
"""Products over multiples of so many tokens are computed in 16 bits on CPUs that have instructions for them. Kernels
for 16 bits are compiled anew for every number of tokens, which costs more than a product takes, and a cache grows by
one token at a time."""


def grouped_logits(query: Tensor, key: Tensor) -> Tensor:
    """Return the products [B, H, S, T] of queries [B, H, S, R] and keys [B, K, T, R]; H/K heads share a key head.

    They are logits, so they are in float32 or wider.
    """
    batch, heads, length, dim = query.shape
    folded = query.reshape(batch, key.shape[1], -1, dim)  # [B, K, H/K·S, R]
    if is_transposed(key):
        return logit_product(folded, key.mT).reshape(batch, heads, length, -1)
    logits = logit_product(key, folded.transpose(2, 3)).transpose(2, 3)
    return logits.reshape(batch, heads, length, -1)


def logit_product(left: Tensor, right: Tensor) -> Tensor:
    """Return the product of queries and keys in float32 or wider.

    A softmax turns the absolute error of a logit into a relative error of its weight, and logits reach some tens, where
    16 bits round to a sixteenth.
    """
    dtype = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
    return _multiplied(left.to(dtype), right.to(dtype)).to(dtype)  # Autocast gives 16 bits all the same.


def weighted_sum(weights: Tensor, vectors: Tensor) -> Tensor:
    """Return sums of cached vectors [..., T, w] with weights [..., M, T], in the dtype in which they are computed.

    That is `working_dtype` of the vectors, which are in float32 where codes were opened.
    """
    dtype = working_dtype(vectors.dtype, vectors.device, vectors.shape[-2])
    return _multiplied(weights.to(dtype), vectors.to(dtype))


def _multiplied(left: Tensor, right: Tensor) -> Tensor:
    # For 16 bits `matmul` copies a factor whose tokens lie side by side, which takes longer than the product.
    return (torch.bmm if left.ndim == right.ndim == 3 else torch.matmul)(left, right)


def working_dtype(dtype: torch.dtype, device: torch.device, tokens: int) -> torch.dtype:
    """Return the dtype in which products over some tokens are fastest, for vectors and queries of a dtype.

    Without instructions for 16 bits a CPU takes many times as long for products in 16 bits as for those in float32.
    Graphs that are compiled hold for any number of tokens, so there the number does not decide.
    """
    if device.type != "cpu" or dtype.itemsize > 2:
        return dtype
    slow = torch.compiler.is_compiling() or tokens % WHOLE_TOKENS or not multiplies(dtype)
    return torch.float32 if slow else dtype


def attention_dtype(dtype: torch.dtype, device: torch.device, tokens: int) -> torch.dtype:
    """Return the dtype in which PyTorch's fused attention over some tokens is fastest, for vectors of a dtype.

    On CPUs it uses only AMX's instructions for 16 bits, and is slower in 16 bits than in float32 without them.
    """
    if device.type != "cpu" or dtype.itemsize > 2 or _has("_is_amx_tile_supported"):
        return working_dtype(dtype, device, tokens)
    return torch.float32


def multiplies(dtype: torch.dtype) -> bool:
    """Return whether the processor has instructions for matrix products in a dtype of 16 bits."""
    return _has("_is_amx_tile_supported") or (dtype == torch.bfloat16 and _has("_is_avx512_bf16_supported"))


@lru_cache(maxsize=8)
def _has(question: str) -> bool:
    """Return PyTorch's answer to a question about the processor, and False where it does not know the question."""
    return bool(getattr(torch.cpu, question, lambda: False)())


def grouped_context(weights: Tensor, value: Tensor) -> Tensor:
    """Return the sums [B, H, S, v] of values [B, U, T, v] with weights [B, H, S, T]; H/U heads share a value head."""
    batch, heads, length, tokens = weights.shape
    folded = weighted_sum(weights.reshape(batch, value.shape[1], -1, tokens), value)  # [B, U, H/U·S, v]
    return folded.reshape(batch, heads, length, -1)


def folded_queries(queries: Tensor, up: Tensor) -> Tensor:
    """Return queries [B, H, S, a] times the key up-projection [U, a, r], [B, H, S, r]; H/U heads share a matrix."""
    mapped = torch.bmm(_by_matrix(queries, up), up)
    return _by_head(mapped, queries)


def up_projected_context(context: Tensor, mass: Tensor, up: Tensor, bias: Tensor | None, skip: int = 0) -> Tensor:
    """Up-project a weighted sum of latents to values.

    Args:
        context: Weighted sum of latents, [B, H, S, r].
        mass: Sum of the weights, [B, H, S, 1], which multiplies the bias.
        up: Value up-projection, [U, skip + v, r]; H/U heads share a matrix.
        bias: Its bias, [U, skip + v], or None.
        skip: Number of first rows of `up` that do not make values. They are computed and dropped, because cutting them
            off first would copy the weight.

    Returns:
        The values, [B, H, S, v].
    """
    rows = _by_matrix(context, up).transpose(1, 2)  # the weight is the left factor, as it lies in memory
    values = _by_head(torch.bmm(up, rows)[:, skip:].transpose(1, 2), context)
    if bias is None:
        return values
    return values + mass * bias[:, skip:].repeat_interleave(values.shape[1] // len(bias), 0)[:, None]


def query_bias_logits(queries: Tensor, bias: Tensor) -> Tensor:
    """Return what the bias [U, a] of the key up-projection adds to the logits of queries [B, H, S, a], [B, H, S, 1]."""
    return (queries * bias.repeat_interleave(queries.shape[1] // len(bias), 0)[:, None]).sum(-1, keepdim=True)


def _by_matrix(x: Tensor, matrices: Tensor) -> Tensor:
    """Group the rows of x [B, H, S, a] by the matrix that their head uses, [U, B·H/U·S, a].

    All rows of a batch go into one product, because broadcasting over the batch would copy the matrices.
    """
    batch, _, _, dim = x.shape
    return x.reshape(batch, len(matrices), -1, dim).transpose(0, 1).reshape(len(matrices), -1, dim)


def _by_head(mapped: Tensor, x: Tensor) -> Tensor:
    """Undo `_by_matrix`: return the rows [U, B·H/U·S, b] in the shape [B, H, S, b]."""
    return mapped.unflatten(1, (len(x), -1)).transpose(0, 1).reshape(*x.shape[:3], -1)


def absorbing_saves(
    queries: int, tokens: int, rank: int, heads: int, up_heads: int, key_dim: int, value_dim: int
) -> bool:
    """Return whether latent-space attention takes fewer multiply-adds than expanding the cache.

    Expanding costs T·r·U·(key + value) once and H·S·T·(key + value) for the attention; absorbing costs
    S·H·r·(key + value) and H·S·T·r for each side that is absorbed. A side of zero dims is not absorbed. Work that both
    ways have to do (the rotary logits) is not counted.

    Args:
        queries: Number of query tokens, S.
        tokens: Number of cached tokens, T.
        rank: Rank of the latent, r.
        heads: Number of query heads, H.
        up_heads: Number of heads that the up-projection makes, U.
        key_dim: Position-free key dims, n, or 0 if keys are expanded in any case.
        value_dim: Value dims, v, or 0 if values are expanded in any case.
    """
    dims, sides = key_dim + value_dim, (key_dim > 0) + (value_dim > 0)
    expand = tokens * rank * up_heads * dims + heads * queries * tokens * dims
    absorb = queries * heads * rank * dims + heads * queries * tokens * rank * sides
    return absorb < expand
