"""Coded latents keep their exempt tokens through every operation of a cache."""

from __future__ import annotations

import torch
from torch import Tensor

from optimum_mla.cache.coded import CodedStored
from optimum_mla.codec import coded

CHANNELS = ((5, 8), (2, 16))


def latents(batch: int = 3, tokens: int = 7) -> Tensor:
    exempt = torch.zeros(batch, tokens, dtype=torch.bool)
    exempt[:, :2] = True
    exempt[1, -2] = True
    return coded(3 * torch.randn(batch, tokens, 24), CHANNELS, exempt)


def test_every_operation_gives_what_it_gives_for_plain_latents() -> None:
    plain = latents()
    stored = CodedStored.encode(plain, CHANNELS)
    assert len(stored.exempt) == 3 * 2 + 1
    assert torch.equal(stored.open().vectors, plain)
    assert (stored.batch, stored.tokens, stored.opened_width) == (3, 7, 24)
    newer = latents(tokens=4)
    assert torch.equal(
        stored.joined(CodedStored.encode(newer, CHANNELS)).open().vectors, torch.cat([plain, newer], dim=1)
    )
    assert torch.equal(stored.cut(1, 6).open().vectors, plain[:, 1:6])
    for indices in (torch.tensor([2, 0, 0, 1]), torch.tensor([True, False, True])):
        assert torch.equal(stored.rows(indices).open().vectors, plain[indices])
    memory = torch.empty(3, 7, 24)
    assert stored.to(torch.device("cpu")).open(memory).vectors is memory
    assert torch.equal(memory, plain)


def test_the_bytes_are_those_of_the_codes_and_of_exempt_tokens() -> None:
    stored = CodedStored.encode(latents(), CHANNELS)
    held = sum(tensor.nbytes for tensor in stored.tensors)
    assert held == 3 * 7 * (8 * 5 + 16 * 2) // 8 + 7 * (24 * 4 + 8)
    assert sum(tensor.nbytes for tensor in stored.cut(2, 5).tensors) == 3 * 3 * 9  # without exempt tokens
