"""The interface through which attention reads cached tokens in blocks, however they are stored.

B, S, T and H are as in `docs/notation.md`; w is the width of a cached vector, and M is any number of query vectors.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from optimum_mla.ops.absorb import WHOLE_TOKENS, logit_product, multiplies, weighted_sum, working_dtype
from optimum_mla.ops.rotary import is_transposed

BLOCK_NUMBERS = 2**20
"""A block holds about so many numbers, which is enough for efficient matrix products and little beside a long cache."""
SHORTEST_BLOCK = 256
"""A block of wide vectors holds at least so many tokens."""


def block_tokens(width: int) -> int:
    """Return the number of tokens in a block of vectors of `width` numbers, a power of two."""
    return max(SHORTEST_BLOCK, 2 ** round(math.log2(BLOCK_NUMBERS / width)))


class Latents:
    """Vectors of some cached tokens, in a form that can be computed with.

    Args:
        vectors: The stored vectors, [B, T, w].
        dtype: The model's dtype, where the vectors are in another one for the time of the computation.
    """

    def __init__(self, vectors: Tensor, dtype: torch.dtype | None = None) -> None:
        self.vectors, self.dtype = vectors, dtype or vectors.dtype

    @property
    def by_channel(self) -> bool:
        """Return whether the numbers of a channel lie side by side in memory, instead of those of a token.

        Products are many times slower if the factor that is read against its order in memory stands on the left.
        """
        return is_transposed(self.vectors)

    @property
    def layout(self) -> Hashable:
        """Return a key of the stored form; `lift` and `lower` do the same for all latents of one layout."""
        return None

    def lift(self, queries: Tensor) -> Tensor:
        """Return queries [..., w] in a form whose products with the stored vectors are those with the original ones."""
        return queries

    def lower(self, sums: Tensor) -> Tensor:
        """Turn weighted sums of the stored vectors [..., ·] into sums of the original vectors, [..., w]."""
        return sums

    def logits(self, queries: Tensor) -> Tensor:
        """Return the inner products of queries [B, M, w] with the vector of every token, [B, M, T], in float32."""
        if self.by_channel:
            return logit_product(self.lift(queries), self.vectors.mT)
        return logit_product(self.vectors, self.lift(queries).transpose(1, 2)).transpose(1, 2)

    def context(self, weights: Tensor) -> Tensor:
        """Return the sums of the vectors with weights [B, M, T], [B, M, w]."""
        return self.lower(weighted_sum(weights, self.vectors))

    def project(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return a linear map with weight [m, w] and bias [m] of every vector, [B, T, m].

        The numbers of a row of the weight lie side by side in memory for all tokens. On CPUs the result is in float32
        if the weight is in 16 bits, because its readers compute in float32 there.
        """
        lifted, dtype, tokens = self.lift(weight), weight.dtype, self.vectors.shape[1]
        on_cpu = weight.device.type == "cpu" and dtype.itemsize == 2
        if not on_cpu or torch.compiler.is_compiling() or not multiplies(dtype):
            return _projected(self.vectors.to(working_dtype(dtype, weight.device, tokens)), lifted, bias)
        # 16 bits for whole multiples of tokens, for which there is a kernel already, and float32 for the rest.
        made = self.vectors.new_empty(len(self.vectors), len(weight), tokens, dtype=torch.float32).mT
        whole = tokens - tokens % WHOLE_TOKENS
        for span, working in ((slice(0, whole), dtype), (slice(whole, tokens), torch.float32)):
            if span.start < span.stop:
                made[:, span] = _projected(self.vectors[:, span].to(working), lifted, bias)
        return made

    def dense(self) -> Tensor:
        """Return the original vectors as a plain tensor, [B, T, w]."""
        return self.lower(self.vectors).to(self.dtype)


def _projected(vectors: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return a linear map with weight [m, w] and bias [m] of vectors [B, T, w] in their dtype, [B, T, m]."""
    # A product of a matrix and a batch would be computed token by token, so both factors are batches.
    batched = weight.to(vectors.dtype).expand(len(vectors), -1, -1)
    if bias is None:
        return torch.bmm(batched, vectors.mT).mT
    return torch.baddbmm(bias.to(vectors.dtype)[:, None], batched, vectors.mT).mT


class ShiftedLatents(Latents):
    """Vectors in groups of numbers that share a shift, which is stored after the numbers and not added to them.

    Adding the shifts would take as long as all the rest of decoding. Instead, the shift of a group is multiplied by the
    sum of the query's numbers in that group.

    Args:
        vectors: The numbers of all groups, then the shifts of the groups, [B, T, groups·g + shifts].
        shifts: Number of shifts, which is the number of groups, or 0 without shifts.
        group: Numbers in a group, g.
        width: Width of the original vectors, w; the numbers after it are padding of the last group.
    """

    def __init__(self, vectors: Tensor, shifts: int, group: int, width: int) -> None:
        super().__init__(vectors)
        self.shifts, self.group, self.width = shifts, group, width

    @property
    def layout(self) -> Hashable:
        return self.shifts, self.group, self.width, self.vectors.shape[-1]

    def lift(self, queries: Tensor) -> Tensor:
        numbers = nn.functional.pad(queries, (0, self.vectors.shape[-1] - self.shifts - self.width))
        if not self.shifts:
            return numbers
        return torch.cat([numbers, numbers.unflatten(-1, (self.shifts, self.group)).sum(-1)], dim=-1)

    def lower(self, sums: Tensor) -> Tensor:
        if self.shifts:
            numbers, shifts = sums.split([sums.shape[-1] - self.shifts, self.shifts], dim=-1)
            sums = (numbers.unflatten(-1, (self.shifts, self.group)) + shifts.unsqueeze(-1)).flatten(-2)
        return sums[..., : self.width]


class Block(NamedTuple):
    """Some consecutive tokens of one layer's cache.

    Attributes:
        first: The first cached vectors, which are the joint latent or the key latent.
        second: The second cached vectors, the rotary key [B, T, K·R] or the value latent; their width may be 0.
        key_factors: The factors of the key norms, [B, T, G]; the width is 0 without key norms.
        adjacent: The stored vectors of `first` and `second` as one tensor if they lie side by side in memory, or None.
    """

    first: Latents
    second: Latents
    key_factors: Tensor
    adjacent: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens in this block."""
        return self.key_factors.shape[1]


class CacheView(ABC):
    """All cached tokens that a step attends to, oldest first; iterating reads one block at a time."""

    @property
    def tokens(self) -> int:
        """Number of tokens in all blocks together, T."""
        return sum(self.sizes)

    @property
    @abstractmethod
    def sizes(self) -> list[int]:
        """Number of tokens in each block, in order."""

    @property
    @abstractmethod
    def is_dense(self) -> bool:
        """Return whether all tokens lie in memory as plain tensors, so that `whole` has nothing to decode."""

    @property
    @abstractmethod
    def num_key_factors(self) -> int:
        """Number of key-norm factors per token, G, or 0 without key norms."""

    @abstractmethod
    def __iter__(self) -> Iterator[Block]:
        """Yield the blocks in order. The content of a block is valid until the next block is asked for."""

    @abstractmethod
    def whole(self) -> Block:
        """Return all tokens as one dense block."""


class TensorView(CacheView):
    """The two tensors of a Transformers cache, [B, 1, T, ·], read in slices without copying.

    Args:
        first: First cached tensor.
        second: Second cached tensor.
        num_key_factors: Number of key-norm factors, which are the last numbers of `second`.
    """

    def __init__(self, first: Tensor, second: Tensor, num_key_factors: int) -> None:
        self.first, self.second = first[:, 0], second[:, 0]
        self.width = self.second.shape[-1] - num_key_factors

    @property
    def sizes(self) -> list[int]:
        tokens, size = self.first.shape[1], block_tokens(self.first.shape[2])
        return [min(size, tokens - start) for start in range(0, tokens, size)]

    @property
    def is_dense(self) -> bool:
        return True

    @property
    def num_key_factors(self) -> int:
        return self.second.shape[-1] - self.width

    def __iter__(self) -> Iterator[Block]:
        start = 0
        for size in self.sizes:
            yield self._slice(start, start + size)
            start += size

    def whole(self) -> Block:
        return self._slice(0, self.first.shape[1])

    def _slice(self, start: int, stop: int) -> Block:
        second, key_factors = self.second[:, start:stop].split([self.width, self.second.shape[-1] - self.width], dim=-1)
        return Block(Latents(self.first[:, start:stop]), Latents(second), key_factors)


def concatenate(blocks: list[Block]) -> Block:
    """Join several blocks into one dense block."""
    if len(blocks) == 1 and blocks[0].first.layout is blocks[0].second.layout is None:
        return blocks[0]
    return Block(
        Latents(torch.cat([block.first.dense() for block in blocks], dim=1)),
        Latents(torch.cat([block.second.dense() for block in blocks], dim=1)),
        torch.cat([block.key_factors for block in blocks], dim=1),
    )
