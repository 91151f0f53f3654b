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
"""Query energies below this share of the largest one are raised to it, because a dead pair has no scale of its own."""


class RopeMix(NamedTuple):
    """Maps over the key heads inside each frequency, complex128 [D/2, G, G].

    The logits are the sums over mixed heads j and frequencies p of Re(conj(q'_j) k'_j).

    Attributes:
        keys: Mixes the keys, k'_j = Σ_g keys[p, j, g] k_g.
        queries: Mixes the queries, q'_j = queries[p, j, g] q_g for a query of key head g.
    """

    keys: Tensor
    queries: Tensor


def identity_mix(heads: int, pairs: int, device: torch.device | None = None) -> RopeMix:
    """Return the mix that leaves the key heads as they are."""
    eye = torch.eye(heads, dtype=torch.complex128, device=device).expand(pairs, heads, heads)
    return RopeMix(eye, eye)


def query_aware_mix(keys: Tensor, query_energy: Tensor) -> RopeMix:
    """Return the mix that gathers as much of the logits as possible in the first mixed heads of each frequency.

    It consists of the eigenvectors of S^½ C S^½, where C is the covariance of the keys over the heads and S the energy
    of the queries per key head. Keys are scaled by S^½ and queries by its inverse.

    Args:
        keys: Second moments E[k kᴴ] of the complex pairs of the keys over the heads, complex [D/2, G, G].
        query_energy: Mean of |q|² of each pair, summed over the query heads of each key head, [G, D/2].
    """
    energy = query_energy.T.clamp_min(SMALLEST_ENERGY * float(query_energy.max()) or 1.0)
    root = energy.sqrt()  # [D/2, G]
    vectors = torch.linalg.eigh(root[:, :, None] * keys * root[:, None, :]).eigenvectors.flip(-1)  # largest first
    # The phase of an eigenvector is arbitrary. It is fixed by making the largest entry real and positive.
    peaks = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    vectors = vectors * (peaks.conj() / peaks.abs())
    return RopeMix(vectors.mH * root[:, None, :], vectors.mH / root[:, None, :])


def as_pairs(heads: Tensor) -> Tensor:
    """Return half-split dims [X, D, ...] as complex pairs [X, D/2, ...]."""
    return torch.complex(*heads.chunk(2, dim=1))


def mixed_keys(mix: RopeMix, keys: Tensor) -> Tensor:
    """Return the complex components [G·D/2, ...] of keys [G, D, ...] after mixing."""
    return torch.einsum("pjg,gp...->jp...", mix.keys, as_pairs(keys)).flatten(0, 1)


def query_map(mix: RopeMix, head: int, components: Tensor) -> Tensor:
    """Return the matrix [2·m, D] that maps a query to its mixed components, first real parts, then imaginary ones.

    Args:
        mix: The mix.
        head: The key head that the query reads.
        components: The components to make, [m].
    """
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
