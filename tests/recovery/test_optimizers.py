"""Muon and AdamW behind one optimizer, against each alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from optimum_mla import GQA2MLA
from optimum_mla.core.errors import InvalidValueError, OptionError
from optimum_mla.recovery import prepare
from optimum_mla.recovery.optimizers import MuonAdamW, muon
from optimum_mla.recovery.recipe import Recipe
from tests.cases import source_model, token_ids


def trained(model: nn.Module, *optimizers: Any, steps: int = 3) -> dict[str, torch.Tensor]:
    ids = token_ids()
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return dict(model.named_parameters())


@pytest.mark.parametrize("family", ["llama", "llama multi-head, tied"])
def test_every_parameter_moves_as_under_its_own_optimizer(family: str) -> None:
    model = GQA2MLA(kv_cache_ratio=0.5)(source_model(family)).train()
    apart = copy.deepcopy(model)
    matrices = [p for n, p in apart.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    others = [p for n, p in apart.named_parameters() if p.ndim != 2 or "embed" in n or "lm_head" in n]
    assert matrices
    assert others
    together = trained(model, muon(model, lr=1e-2, weight_decay=0.1, betas=(0.8, 0.9)))
    expected = trained(
        apart,
        torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=1e-2, weight_decay=0.0, betas=(0.8, 0.9)),
    )
    for name, parameter in together.items():
        assert torch.equal(parameter, expected[name]), name


def test_only_what_trains_is_optimized_and_schedules_reach_all_of_it() -> None:
    model = prepare(GQA2MLA(kv_cache_ratio=0.5)(source_model("llama with biases")), "kv")
    optimizer = muon(model, lr=0.5)
    assert len(optimizer.parts) == 2  # the projections' weights, and their biases
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    schedule = LambdaLR(optimizer, lambda step: 0.1**step)
    optimizer.step()
    schedule.step()
    assert [group["lr"] for part in optimizer.parts for group in part.param_groups] == pytest.approx([0.05, 0.05])


def test_a_saved_state_goes_on_alike() -> None:
    model = GQA2MLA(kv_cache_ratio=0.5)(source_model("llama")).train()
    first = muon(model, lr=1e-2)
    trained(model, first)
    other = copy.deepcopy(model)
    second = muon(other, lr=1.0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert len(second.state) == len(list(model.parameters()))
    expected = trained(model, first)
    for name, parameter in trained(other, second).items():
        assert torch.equal(parameter, expected[name]), name


def test_the_state_of_an_older_version_is_refused_in_one_line() -> None:
    model = GQA2MLA(kv_cache_ratio=0.5)(source_model("llama")).train()
    optimizer = muon(model, lr=1e-2)
    older = {"parts": [part.state_dict() for part in optimizer.parts]}
    with pytest.raises(OptionError, match=r"^--resume: the state of the optimizer muon .*--overwrite.*\.$"):
        optimizer.load_state_dict(older)


def test_matrices_alone_need_no_second_part() -> None:
    weight = nn.Parameter(torch.eye(3))
    weight.grad = torch.ones(3, 3)
    optimizer = MuonAdamW([weight], [], lr=0.1)
    assert optimizer.step(lambda: 2.5) == 2.5
    assert [type(part) for part in optimizer.parts] == [torch.optim.Muon]
    assert not torch.equal(weight, torch.eye(3))


def test_preferences_are_learned_by_adamw() -> None:
    with pytest.raises(InvalidValueError, match=r"optimizer: got 'muon', allowed: adamw"):
        Recipe(objective="dpo", optimizer="muon")
