"""What is absorbed is exactly what calling the up-projection would give; else it is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from torch import Tensor, nn
from torch.nn.utils import parametrize

from optimum_mla.nn.plain import is_plain
from tests.cases import token_ids
from tests.nn.test_attention import FORMS, build, forced, latent_attentions

IDS = token_ids(2, 14)


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


class Wrapped(Tensor):
    """A tensor subclass whose products are halved, as quantized weights have products of their own."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [arg.as_subclass(Tensor) if isinstance(arg, Wrapped) else arg for arg in args]
        result = function(*plain, **(kwargs or {}))
        return result / 2 if function is nn.functional.linear else result


def by_subclass(linear: nn.Linear) -> None:
    linear._parameters["weight"] = linear.weight.detach().as_subclass(Wrapped)  # type: ignore[assignment]


def by_forward(linear: nn.Linear) -> None:
    plain = linear.forward
    linear.forward = lambda x: plain(x) / 2  # type: ignore[method-assign]


CHANGES: dict[str, Callable[[nn.Linear], Any]] = {
    "a forward hook": lambda linear: linear.register_forward_hook(lambda module, args, output: output / 2),
    "a forward pre-hook": lambda linear: linear.register_forward_pre_hook(lambda module, args: (args[0] / 2,)),
    "a parametrization": lambda linear: parametrize.register_parametrization(linear, "weight", Halved()),
    "a tensor subclass": by_subclass,
    "another forward": by_forward,
}


def up_projections(model: nn.Module) -> list[nn.Linear]:
    names = ("kv_b_proj", "k_rope_proj", "k_b_proj", "v_b_proj")
    return [
        getattr(attention, name) for attention in latent_attentions(model) for name in names if hasattr(attention, name)
    ]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_what_acts_on_a_call_acts_in_decoding(form: str, change: str) -> None:
    model = build("Llama", form)
    before = model(IDS, use_cache=False).logits
    for linear in up_projections(model):
        assert is_plain(linear)
        CHANGES[change](linear)
        assert not is_plain(linear)
    expected = model(IDS, use_cache=False).logits
    assert (expected - before).abs().max() > 1e-2
    for settings in ({}, {"bits": 8, "residual_length": 32}):
        with forced(model, absorb=True):
            cache = model.make_cache(**settings)
            pieces = [model(piece, cache=cache).logits for piece in (IDS[:, :10], *IDS[:, 10:].split(1, dim=1))]
        assert (torch.cat(pieces, dim=1) - expected).abs().max() <= 1e-4


@torch.no_grad()
def test_a_spread_model_absorbs_where_its_weights_stay() -> None:
    model = build("Llama", "shared rotary key")
    expected = model(IDS, use_cache=False).logits
    devices = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu"}
    devices |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        spread = dispatch_model(model, devices, main_device="cpu", offload_dir=folder)
        plain = [is_plain(attention.kv_b_proj) for attention in latent_attentions(spread)]
        assert plain == [True, False, True]
        cache = spread.make_cache()
        pieces = [spread(piece, cache=cache).logits for piece in (IDS[:, :10], *IDS[:, 10:].split(1, dim=1))]
    assert (torch.cat(pieces, dim=1) - expected).abs().max() <= 1e-4


def test_a_hook_on_every_module_is_heard() -> None:
    linear = nn.Linear(4, 4)
    assert is_plain(linear)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    assert not is_plain(linear)
    handle.remove()
    assert is_plain(linear)
