"""Measurement of perplexity, and comparison of next-token distributions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from optimum_mla.core.progress import progress
from optimum_mla.stack import cache_argument

LARGEST_MEAN_LOSS = 700.0
"""Largest mean loss whose exponential is taken; that of more would overflow a float."""
TOKENS_PER_BATCH = 4096
"""Largest number of tokens in one forward pass, which bounds the memory of the logits."""
DECODED_ROWS = 32
"""Number of windows that are decoded in one batch."""


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: Tensor) -> float:
    """Return the exponential of the mean negative log-likelihood per predicted token.

    Every window starts from an empty context, and all its tokens but the first are predicted.

    Args:
        model: A causal language model.
        windows: Token ids, [N, L], with L of at least 2.
    """
    with evaluating(model):
        batch = max(1, TOKENS_PER_BATCH // windows.shape[1])
        total = 0.0
        for ids in progress(windows.split(batch), "perplexity"):
            ids = ids.to(model.device)
            total += _loss(model(ids, use_cache=False).logits[:, :-1], ids[:, 1:])
    return _perplexity(total, windows)


@torch.no_grad()
def decoding_perplexity(model: PreTrainedModel, windows: Tensor, make_cache: Callable[[], Cache]) -> float:
    """Return the perplexity of tokens that go through a live cache one at a time, as in generation.

    Args:
        model: A causal language model.
        windows: Token ids, [N, L], with L of at least 2.
        make_cache: Returns an empty cache.
    """
    total = 0.0
    with evaluating(model):
        for ids in windows.split(DECODED_ROWS):
            ids, cache = ids.to(model.device), make_cache()
            for place in progress(range(ids.shape[1] - 1), "perplexity, token by token"):
                logits = model(ids[:, place : place + 1], **cache_argument(model, cache), use_cache=True).logits
                total += _loss(logits, ids[:, place + 1 : place + 2])
    return _perplexity(total, windows)


def sliding_windows(tokens: Tensor, length: int, stride: int) -> Tensor:
    """Return windows [N, length] of consecutive tokens [T], which start `stride` tokens apart.

    If the last `stride` tokens of each window are scored, every token from index `length - stride` on is scored once,
    with at least that many tokens of context. The tokens before are only context.
    """
    return tokens.unfold(0, length, stride)


@dataclass(frozen=True)
class Comparison:
    """The next-token quality of a model beside that of a baseline; without a baseline the last three are None.

    Attributes:
        perplexity: Perplexity of the model on the scored tokens.
        tokens: Number of scored tokens.
        baseline_perplexity: Perplexity of the baseline on the same tokens.
        agreement: Share of the tokens at which both models have the same likeliest next token.
        kl: Mean KL divergence from the baseline's next-token distribution to the model's, in nats.
    """

    perplexity: float
    baseline_perplexity: float | None
    agreement: float | None
    kl: float | None
    tokens: int


@torch.no_grad()
def compare_decoding(
    model: PreTrainedModel,
    make_cache: Callable[[], Cache],
    windows: Tensor,
    stride: int,
    baseline: PreTrainedModel | None = None,
    make_baseline_cache: Callable[[], Cache] | None = None,
) -> Comparison:
    """Score the last `stride` tokens of each window, one token at a time through live caches.

    The tokens before them go through the caches in one call, as a prompt does.

    Args:
        model: A causal language model.
        make_cache: Returns an empty cache for the model.
        windows: Token ids, [N, L].
        stride: Number of tokens to score in each window, below L.
        baseline: Another model on the same vocabulary, which gets the same tokens.
        make_baseline_cache: Returns an empty cache for the baseline.
    """
    pairs = [(model, make_cache)]
    if baseline is not None and make_baseline_cache is not None:
        pairs.append((baseline, make_baseline_cache))
    losses, agreed, divergence = [0.0] * len(pairs), 0.0, 0.0
    start = windows.shape[1] - stride
    for ids in windows.split(DECODED_ROWS):
        caches = [make() for _, make in pairs]
        for place in progress(range(start, windows.shape[1]), "quality, token by token"):
            fed = ids[:, :start] if place == start else ids[:, place - 1 : place]
            logits = []
            for (one, _), cache in zip(pairs, caches, strict=True):
                with evaluating(one):
                    out = one(fed.to(one.device), **cache_argument(one, cache), use_cache=True, logits_to_keep=1)
                logits.append(out.logits[:, -1].float().to(model.device))
            target = ids[:, place].to(model.device)
            for index, value in enumerate(logits):
                losses[index] += _loss(value[:, None], target[:, None])
            if len(logits) == 2:
                mine, theirs = (value.log_softmax(-1) for value in logits)
                agreed += (mine.argmax(-1) == theirs.argmax(-1)).sum().item()
                divergence += torch.nn.functional.kl_div(mine, theirs, reduction="sum", log_target=True).item()
    count = windows.shape[0] * stride
    values = [math.exp(loss / count) if loss / count < LARGEST_MEAN_LOSS else math.inf for loss in losses]
    if len(pairs) == 1:
        return Comparison(values[0], None, None, None, count)
    return Comparison(values[0], values[1], agreed / count, divergence / count, count)


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Keep a model in evaluation mode as long as the context lasts."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _loss(logits: Tensor, targets: Tensor) -> float:
    """Return the sum of the negative log-likelihoods of targets [B, S] under logits [B, S, vocabulary]."""
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum").item()


def _perplexity(total: float, windows: Tensor) -> float:
    mean = total / (windows.shape[0] * (windows.shape[1] - 1))
    return math.exp(mean) if mean < LARGEST_MEAN_LOSS else math.inf
