"""Measurement of the prefill and decoding speed of several models or caches in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median, quantiles

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from optimum_mla.measure.quality import evaluating, read_through

WARM_UPS = 1
"""Number of first rounds that are not counted."""


@dataclass
class Contender:
    """A model with one kind of cache, and its times.

    Attributes:
        model: A causal language model.
        make_cache: Returns an empty cache.
        prefill_seconds: Time of each prefill.
        step_seconds: Time of each decoding step.
        attention_share: Share of a decoding step that the attention modules take; None if it is not measured.
    """

    model: PreTrainedModel
    make_cache: Callable[[], Cache]
    prefill_seconds: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    attention_share: float | None = None


def spread(times: list[float]) -> float:
    """Return the distance between the quartiles divided by the median."""
    if len(times) < 2:
        return 0.0
    low, _, high = quantiles(times, n=4, method="inclusive")
    return (high - low) / median(times)


@torch.no_grad()
def time_in_turn(contenders: list[Contender], ids: Tensor, new_tokens: int, repeats: int) -> None:
    """Measure the times of all contenders and store them in the contenders.

    They are timed alternately, so that other load on the machine affects all of them. In each round every contender
    does a prefill and some decoding steps; the first round is not counted. The last round is followed by steps in which
    the attention modules are timed, which do not count as speed.

    Args:
        contenders: The models with their caches; changed in place.
        ids: Token ids of the prompt, [B, T].
        new_tokens: Number of decoding steps after each prefill.
        repeats: Number of rounds that are counted.
    """
    for round_ in range(WARM_UPS + repeats):
        for contender in contenders:
            with evaluating(contender.model):
                cache = contender.make_cache()
                prefill = _timed(contender, ids, cache)
                steps = [_timed(contender, ids[:, -1:], cache) for _ in range(new_tokens)]
                if round_ >= WARM_UPS:
                    contender.prefill_seconds.append(prefill)
                    contender.step_seconds += steps
                if round_ == WARM_UPS + repeats - 1:
                    contender.attention_share = _attention_share(contender, ids[:, -1:], cache, new_tokens)
                del cache


def _timed(contender: Contender, ids: Tensor, cache: Cache) -> float:
    _synchronize(ids)
    start = time.perf_counter()
    read_through(contender.model, cache, ids, logits_to_keep=1)
    _synchronize(ids)
    return time.perf_counter() - start


def _synchronize(tensor: Tensor) -> None:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)


def _attention_share(contender: Contender, token: Tensor, cache: Cache, steps: int) -> float | None:
    """Return the share of the time of `steps` decoding steps that the attention modules take."""
    with attention_clock(contender.model, token) as inside:
        total = sum(_timed(contender, token, cache) for _ in range(steps))
    return sum(inside) / total if inside else None


@contextmanager
def attention_clock(model: nn.Module, like: Tensor) -> Iterator[list[float]]:
    """Collect the seconds that each call of an attention module takes, as long as the context lasts."""
    seconds: list[float] = []
    started: list[float] = []

    def before(*_: object) -> None:
        _synchronize(like)
        started.append(time.perf_counter())

    def after(*_: object) -> None:
        _synchronize(like)
        seconds.append(time.perf_counter() - started.pop())

    modules = [module for module in model.modules() if hasattr(module, "layer_idx") and hasattr(module, "o_proj")]
    handles = [module.register_forward_pre_hook(before) for module in modules]
    handles += [module.register_forward_hook(after) for module in modules]
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()
