"""Mixing of key heads inside each frequency against logits computed from complex numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from optimum_mla.ops.rope_mix import RopeMix, as_pairs, identity_mix, mixed_keys, query_aware_mix, query_map


def random_covariance(heads: int, pairs: int, rank: int | None = None) -> Tensor:
    """E[k kᴴ] of random complex keys, [pairs, heads, heads]."""
    root = torch.randn(pairs, heads, heads if rank is None else rank, dtype=torch.complex128)
    return root @ root.mH


def random_mix(heads: int, pairs: int) -> RopeMix:
    """A mix of random keys and queries whose scales differ much."""
    return query_aware_mix(random_covariance(heads, pairs), torch.rand(heads, pairs, dtype=torch.float64) ** 4)


def complex_logits(query: Tensor, keys: Tensor) -> Tensor:
    """Σ Re(conj(q) k) over the first dim: query [m], keys [m, L]."""
    return (query.conj()[:, None] * keys).real.sum(0)


SIZES = {"heads": st.integers(1, 5), "pairs": st.integers(1, 6), "seed": st.integers(0, 1000)}


@given(**SIZES)
def test_logits_stay_the_same_at_rest_and_rotated(heads: int, pairs: int, seed: int) -> None:
    torch.manual_seed(seed)
    length = 5
    keys = torch.randn(heads, 2 * pairs, length, dtype=torch.float64)
    mix = random_mix(heads, pairs)
    mixed = mixed_keys(mix, keys)
    assert mixed.shape == (heads * pairs, length)
    times, query_time = torch.randint(0, 1000, (length,)), 500
    frequencies = torch.rand(pairs, dtype=torch.float64)
    turn = torch.polar(torch.ones(pairs, length).double(), frequencies[:, None] * times)
    query_turn = torch.polar(torch.ones(pairs).double(), frequencies * query_time)
    for head in range(heads):
        query = torch.randn(2 * pairs, dtype=torch.float64)
        pair, key_pairs = torch.complex(*query.chunk(2)), as_pairs(keys)[head]
        new = (mix.queries[:, :, head] * pair[:, None]).T.flatten()  # head-major: c = j·pairs + p
        assert torch.allclose(complex_logits(new, mixed), complex_logits(pair, key_pairs), rtol=1e-7, atol=1e-7)
        assert torch.allclose(complex_logits(pair, key_pairs), query @ keys[head])
        before = complex_logits(pair * query_turn, key_pairs * turn)
        after = complex_logits(new * query_turn.repeat(heads), mixed * turn.repeat(heads, 1))
        assert torch.allclose(after, before, rtol=1e-7, atol=1e-7)


@given(data=st.data(), **SIZES)
def test_the_query_map_is_the_complex_formula(data: st.DataObject, heads: int, pairs: int, seed: int) -> None:
    torch.manual_seed(seed)
    mix = random_mix(heads, pairs)
    numbers = st.lists(st.integers(0, heads * pairs - 1), min_size=1, unique=True)
    components = torch.tensor(data.draw(numbers), dtype=torch.long)
    head = data.draw(st.integers(0, heads - 1))
    matrix = query_map(mix, head, components)
    assert matrix.shape == (2 * len(components), 2 * pairs)
    query = torch.randn(2 * pairs, dtype=torch.float64)
    expected = []
    for component in components.tolist():
        j, p = divmod(component, pairs)
        expected.append(mix.queries[p, j, head] * torch.complex(query[p], query[p + pairs]))
    mixed = torch.stack(expected)
    assert torch.allclose(matrix @ query, torch.cat([mixed.real, mixed.imag]))


def test_no_components_make_an_empty_map() -> None:
    assert query_map(random_mix(2, 3), 1, torch.empty(0, dtype=torch.long)).shape == (0, 6)


def test_mapped_queries_read_stacked_keys_with_real_products() -> None:
    heads, pairs = 3, 4
    keys, mix = torch.randn(heads, 2 * pairs, 7, dtype=torch.float64), random_mix(3, 4)
    mixed = mixed_keys(mix, keys)
    everything = torch.arange(heads * pairs)
    for head in range(heads):
        query = torch.randn(2 * pairs, dtype=torch.float64)
        logits = query_map(mix, head, everything) @ query @ torch.cat([mixed.real, mixed.imag])
        assert torch.allclose(logits, query @ keys[head], rtol=1e-7, atol=1e-7)


def test_the_identity_does_nothing() -> None:
    heads, pairs = 3, 4
    keys, mix = torch.randn(heads, 2 * pairs, 7, dtype=torch.float64), identity_mix(3, 4)
    assert torch.equal(mixed_keys(mix, keys), as_pairs(keys).flatten(0, 1))
    for head in range(heads):
        own = torch.arange(head * pairs, (head + 1) * pairs)
        assert torch.equal(query_map(mix, head, own), torch.eye(2 * pairs, dtype=torch.float64))
        others = torch.tensor([c for c in range(heads * pairs) if c not in own])
        assert query_map(mix, head, others).abs().max() == 0


def test_pairs_are_half_split() -> None:
    heads = torch.arange(8.0).view(1, 4, 2)
    assert torch.equal(as_pairs(heads), torch.tensor([[[0 + 4j, 1 + 5j], [2 + 6j, 3 + 7j]]]))


@pytest.mark.parametrize("shape", [(), (3,), (3, 2)])
def test_keys_may_have_any_dims_after(shape: tuple[int, ...]) -> None:
    heads, pairs = 2, 3
    keys, mix = torch.randn(heads, 2 * pairs, *shape, dtype=torch.float64), random_mix(2, 3)
    mixed = mixed_keys(mix, keys).unflatten(0, (heads, pairs))
    for j in range(heads):
        for p in range(pairs):
            parts = [mix.keys[p, j, g] * torch.complex(keys[g, p], keys[g, p + pairs]) for g in range(heads)]
            assert torch.allclose(mixed[j, p], torch.stack(parts).sum(0))


@given(**SIZES)
def test_mixed_keys_are_uncorrelated_and_their_energies_fall(heads: int, pairs: int, seed: int) -> None:
    torch.manual_seed(seed)
    covariance, energy = random_covariance(heads, pairs), torch.rand(heads, pairs, dtype=torch.float64) + 0.01
    mix = query_aware_mix(covariance, energy)
    mixed = mix.keys @ covariance @ mix.keys.mH
    energies = mixed.diagonal(dim1=-2, dim2=-1)
    assert torch.allclose(mixed, torch.diag_embed(energies), atol=1e-8)
    assert energies.imag.abs().max() < 1e-8
    assert (energies.real.diff(dim=1) <= 1e-8).all()
    # The queries that read a mixed key have the energy one, whatever it was: nothing is hidden in their scale.
    readers = (mix.queries.abs().square() * energy.T[:, None]).sum(-1)
    assert torch.allclose(readers, torch.ones_like(readers), rtol=1e-6)


def test_the_first_heads_hold_as_much_of_the_logits_as_any_other_mix() -> None:
    covariance, energy = random_covariance(4, 3), torch.rand(4, 3, dtype=torch.float64) + 0.01
    mix = query_aware_mix(covariance, energy)
    plain = identity_mix(4, 3)

    def shares(candidate: RopeMix) -> Tensor:
        """Energies of the products of query and key [3, 4], largest head first."""
        keys = (candidate.keys @ covariance @ candidate.keys.mH).diagonal(dim1=-2, dim2=-1).real
        readers = (candidate.queries.abs().square() * energy.T[:, None]).sum(-1)
        return (keys * readers).sort(dim=-1, descending=True).values.cumsum(-1)

    assert (shares(mix) >= shares(plain) - 1e-9).all()


@pytest.mark.parametrize("dead", ["one pair of one head", "one pair", "one head", "all queries", "keys", "everything"])
def test_dead_pairs_stay_finite_and_keep_the_logits(dead: str) -> None:
    heads, pairs = 3, 4
    covariance, energy = random_covariance(heads, pairs), torch.rand(heads, pairs, dtype=torch.float64) + 0.01
    where: dict[str, tuple[slice | int, slice | int]] = {
        "one pair of one head": (1, 2),
        "one pair": (slice(None), 2),
        "one head": (1, slice(None)),
        "all queries": (slice(None), slice(None)),
        "everything": (slice(None), slice(None)),
    }
    if dead in where:
        energy[where[dead]] = 0
    if dead in ("keys", "everything"):
        covariance[:] = 0
    mix = query_aware_mix(covariance, energy)
    assert mix.keys.isfinite().all()
    assert mix.queries.isfinite().all()
    eye = torch.eye(heads, dtype=torch.complex128).expand(pairs, heads, heads)
    assert torch.allclose(mix.queries.mH @ mix.keys, eye, atol=1e-8)


def test_the_same_input_gives_the_same_mix_whatever_the_phase_of_the_eigenvectors() -> None:
    covariance, energy = random_covariance(4, 3), torch.rand(4, 3, dtype=torch.float64) + 0.01
    mix = query_aware_mix(covariance, energy)
    again = query_aware_mix(covariance, energy)
    assert torch.equal(mix.keys, again.keys)
    assert torch.equal(mix.queries, again.queries)
    vectors = mix.keys / energy.T.sqrt()[:, None]
    peaks = vectors.gather(-1, vectors.abs().argmax(-1, keepdim=True))
    assert peaks.imag.abs().max() < 1e-12
    assert (peaks.real > 0).all()
