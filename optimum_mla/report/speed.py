"""Prefill and decoding speed of several models or caches, measured in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median, quantiles

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from optimum_mla.report.quality import evaluating
from optimum_mla.stack import cache_argument

WARM_UPS = 1
"""Rounds that are not counted."""


@dataclass
class Contender:
    """A model with one way to cache, and its times.

    Attributes:
        model: A causal language model.
        make_cache: Gives an empty cache.
        prefill_seconds: Of each prefill. step_seconds: Of each decoding step.
        attention_share: Of a decoding step's time; None until it was measured.
    """

    model: PreTrainedModel
    make_cache: Callable[[], Cache]
    prefill_seconds: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    attention_share: float | None = None


def spread(times: list[float]) -> float:
    """Distance of the quartiles over the median."""
    if len(times) < 2:
        return 0.0
    low, _, high = quantiles(times, n=4, method="inclusive")
    return (high - low) / median(times)


@torch.no_grad()
def time_in_turn(contenders: list[Contender], ids: Tensor, new_tokens: int, repeats: int) -> None:
    """Fill in the contenders' times: in each round every one does a prefill of `ids` [B, T] and `new_tokens` steps.

    In turn, so that what disturbs the machine disturbs all of them; the first round is not counted. The last round is
    followed by steps with a clock around every attention module, which are not counted as speed.
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
    contender.model(ids, **cache_argument(contender.model, cache), use_cache=True, logits_to_keep=1)
    _synchronize(ids)
    return time.perf_counter() - start


def _synchronize(tensor: Tensor) -> None:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)


def _attention_share(contender: Contender, token: Tensor, cache: Cache, steps: int) -> float | None:
    """Share of the time of `steps` steps that the attention modules take."""
    with attention_clock(contender.model, token) as inside:
        total = sum(_timed(contender, token, cache) for _ in range(steps))
    return sum(inside) / total if inside else None


@contextmanager
def attention_clock(model: nn.Module, like: Tensor) -> Iterator[list[float]]:
    """Seconds that each call of an attention module takes, as long as the context lasts."""
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
