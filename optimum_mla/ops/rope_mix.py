"""Mixing of key heads inside each rotary frequency.

A rotary pair is a complex number that turns by e^{iθt}. Multiplying it by a complex number turns and scales it, which
commutes with the turning: so inside one frequency any invertible complex matrix over the G key heads may be applied to
the keys, and its inverse to the queries, and every logit stays the same (TransMLA mixes with a real orthogonal matrix;
a complex one also aligns the heads' phases, and is weighted by the queries that read the keys).

Components are numbered head-major: component c of G·D/2 is mixed head c // (D/2), frequency c % (D/2).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST_ENERGY = 1e-9
"""Query energies below this share of the largest one count as this share: a dead pair has no scale of its own."""


class RopeMix(NamedTuple):
    """Maps of each frequency, complex128 [D/2, G, G].

    keys: k'_j = Σ_g keys[p, j, g] k_g. queries: q'_j = queries[p, j, g] q_g for a query of key head g; logits are the
    sums over j and p of Re(conj(q'_j) k'_j).
    """

    keys: Tensor
    queries: Tensor


def identity_mix(heads: int, pairs: int, device: torch.device | None = None) -> RopeMix:
    """The key heads as they are."""
    eye = torch.eye(heads, dtype=torch.complex128, device=device).expand(pairs, heads, heads)
    return RopeMix(eye, eye)


def query_aware_mix(keys: Tensor, query_energy: Tensor) -> RopeMix:
    """Gathers, inside each frequency, as much of the logits as possible into the first mixed heads.

    The eigenvectors V of S^½ C S^½ with C the keys' covariance over heads and S the queries' energy per key head: keys
    are scaled by S^½ and queries by its inverse.

    Args:
        keys: Second moments of the keys' complex pairs over the heads, E[k kᴴ], [D/2, G, G] complex.
        query_energy: E|q|² of the pairs, summed over the query heads of each key head, [G, D/2].
    """
    energy = query_energy.T.clamp_min(SMALLEST_ENERGY * float(query_energy.max()) or 1.0)
    root = energy.sqrt()  # [D/2, G]
    vectors = torch.linalg.eigh(root[:, :, None] * keys * root[:, None, :]).eigenvectors.flip(-1)  # largest first
    # A vector's phase is arbitrary: make its largest entry real and positive.
    peaks = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    vectors = vectors * (peaks.conj() / peaks.abs())
    return RopeMix(vectors.mH * root[:, None, :], vectors.mH / root[:, None, :])


def as_pairs(heads: Tensor) -> Tensor:
    """Half-split dims [X, D, ...] as complex pairs [X, D/2, ...]."""
    return torch.complex(*heads.chunk(2, dim=1))


def mixed_keys(mix: RopeMix, keys: Tensor) -> Tensor:
    """Keys [G, D, ...] mixed: complex components [G·D/2, ...]."""
    return torch.einsum("pjg,gp...->jp...", mix.keys, as_pairs(keys)).flatten(0, 1)


def query_map(mix: RopeMix, head: int, components: Tensor) -> Tensor:
    """The matrix [2·m, D] that makes `components` [m] of a query of key head `head`: real parts, then imaginary."""
    pairs = mix.queries.shape[0]
    factors = mix.queries[:, :, head].T.flatten()[components]  # [m]
    rows = torch.arange(len(components), device=factors.device)
    real, imaginary = (
        torch.zeros(len(components), 2 * pairs, dtype=torch.float64, device=factors.device) for _ in range(2)
    )
    first, second = components % pairs, components % pairs + pairs
    real[rows, first], real[rows, second] = factors.real, -factors.imag
    imaginary[rows, first], imaginary[rows, second] = factors.imag, factors.real
    return torch.cat([real, imaginary])
