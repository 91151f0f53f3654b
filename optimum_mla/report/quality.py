"""Perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from optimum_mla.progress import progress

LARGEST_MEAN_LOSS = 700.0
"""exp of more overflows a float."""
TOKENS_PER_BATCH = 4096
"""Tokens in one forward pass: bounds the memory of the logits."""
DECODED_ROWS = 32
"""Windows that are decoded side by side."""


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: Tensor) -> float:
    """exp of the mean negative log-likelihood per predicted token over non-overlapping windows.

    Every window starts from an empty context and predicts all its tokens but the first.

    Args:
        model: A causal language model.
        windows: Token ids [N, L], L at least 2.
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
    """As `perplexity`, but one token at a time through a live cache, as a model generates.

    Args:
        model: A causal language model.
        windows: Token ids [N, L], L at least 2.
        make_cache: Gives an empty cache.
    """
    total = 0.0
    with evaluating(model):
        for ids in windows.split(DECODED_ROWS):
            ids, cache = ids.to(model.device), make_cache()
            for place in progress(range(ids.shape[1] - 1), "perplexity, token by token"):
                logits = model(ids[:, place : place + 1], past_key_values=cache, use_cache=True).logits
                total += _loss(logits, ids[:, place + 1 : place + 2])
    return _perplexity(total, windows)


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """The model in evaluation mode for a while."""
    was_training = model.training
    model.eval()
    yield
    model.train(was_training)


def _loss(logits: Tensor, targets: Tensor) -> float:
    """Sum of the negative log-likelihoods, logits [B, S, vocabulary] and targets [B, S]."""
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum").item()


def _perplexity(total: float, windows: Tensor) -> float:
    mean = total / (windows.shape[0] * (windows.shape[1] - 1))
    return math.exp(mean) if mean < LARGEST_MEAN_LOSS else math.inf
