"""Measurement of perplexity, and comparison of next-token distributions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

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
                logits = read_through(model, cache, ids[:, place : place + 1])
                total += _loss(logits, ids[:, place + 1 : place + 2])
    return _perplexity(total, windows)


@dataclass(frozen=True)
class Mean:
    """A mean over tokens with its standard error.

    Tokens of one sequence depend on each other, so that sequences are what the error counts as independent.

    Attributes:
        value: The mean.
        stderr: Its standard error, or None for a single sequence.
    """

    value: float
    stderr: float | None

    @classmethod
    def of(cls, sequences: Sequence[Tensor]) -> Mean:
        """Return the mean over all tokens of sequences of values, [S] each."""
        sums = torch.stack([values.double().sum() for values in sequences])
        counts = torch.tensor([len(values) for values in sequences], dtype=torch.float64)
        mean, number = float(sums.sum() / counts.sum()), len(sums)
        if number == 1:
            return cls(mean, None)
        apart = (sums - mean * counts).square().sum() * number / (number - 1)
        return cls(mean, float(apart.sqrt() / counts.sum()))


@dataclass(frozen=True)
class Movement:
    """How far the predictions of a model are from those of another one, which is its source or a baseline.

    Attributes:
        divergence_nats: Mean KL divergence from the source's next-token distribution to the model's.
        same_guess_percent: Share of the tokens at which the likeliest next token is the source's.
        tokens: Number of predicted tokens.
    """

    divergence_nats: float
    same_guess_percent: float
    tokens: int


def movement(expected: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """Return the divergence in nats and whether the first guess is the same, for each token, [...] each.

    Args:
        expected: Logarithms of the source's probabilities, [..., vocabulary].
        found: Those of the model.
    """
    divergence = torch.nn.functional.kl_div(found, expected, reduction="none", log_target=True).sum(-1)
    return divergence, expected.argmax(-1) == found.argmax(-1)


@dataclass(frozen=True)
class Comparison:
    """The next-token quality of a model beside that of a baseline; without a baseline all but the first two are None.

    Attributes:
        perplexity: Perplexity of the model on the scored tokens.
        tokens: Number of scored tokens.
        baseline_perplexity: Perplexity of the baseline on the same tokens.
        agreement: Share of the tokens at which both models have the same likeliest next token.
        kl: Mean KL divergence from the baseline's next-token distribution to the model's, in nats.
        kl_stderr: Standard error of `kl`, or None for a single window.
        loss_stderr: Standard error of the difference of both mean negative log-likelihoods, in nats, or None likewise.
    """

    perplexity: float
    tokens: int
    baseline_perplexity: float | None = None
    agreement: float | None = None
    kl: float | None = None
    kl_stderr: float | None = None
    loss_stderr: float | None = None


@torch.no_grad()
def compare_decoding(
    model: PreTrainedModel,
    make_cache: Callable[[], Cache],
    windows: Tensor,
    stride: int,
    baseline: PreTrainedModel | None = None,
    make_baseline_cache: Callable[[], Cache] | None = None,
    together: int = 1,
) -> Comparison:
    """Score the last `stride` tokens of each window, one or a few tokens at a time through live caches.

    The tokens before them go through the caches in one call, as a prompt does.

    Args:
        model: A causal language model.
        make_cache: Returns an empty cache for the model.
        windows: Token ids, [N, L].
        stride: Number of tokens to score in each window, below L.
        baseline: Another model on the same vocabulary, which gets the same tokens.
        make_baseline_cache: Returns an empty cache for the baseline.
        together: Number of tokens that go through the caches at a time after the prompt.
    """
    readers = [(model, make_cache)]
    if baseline is not None and make_baseline_cache is not None:
        readers.append((baseline, make_baseline_cache))
    losses = torch.zeros(len(readers), len(windows), stride, dtype=torch.float64)
    apart, agreed = torch.zeros(2, len(windows), stride, dtype=torch.float64)
    start = windows.shape[1] - stride
    for rows in torch.arange(len(windows)).split(DECODED_ROWS):
        ids = windows[rows]
        for place, predicted in _predictions(readers, ids, start, together):
            stop = place + predicted[0].shape[1]
            target, scored = ids[:, place:stop, None].to(model.device), slice(place - start, stop - start)
            for index, value in enumerate(predicted):
                losses[index, rows, scored] = -value.gather(2, target)[..., 0].double().cpu()
            if len(predicted) == 2:
                mine, theirs = predicted
                divergence, same = movement(theirs, mine)
                apart[rows, scored], agreed[rows, scored] = divergence.double().cpu(), same.double().cpu()
    values = [_exponential(float(loss.mean())) for loss in losses]
    if len(readers) == 1:
        return Comparison(values[0], losses[0].numel())
    kl, excess = Mean.of([*apart]), Mean.of([*(losses[0] - losses[1])])
    return Comparison(
        perplexity=values[0],
        tokens=losses[0].numel(),
        baseline_perplexity=values[1],
        agreement=float(agreed.mean()),
        kl=kl.value,
        kl_stderr=kl.stderr,
        loss_stderr=excess.stderr,
    )


def _predictions(
    readers: list[tuple[PreTrainedModel, Callable[[], Cache]]], ids: Tensor, start: int, together: int
) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield each place from which tokens are predicted, and the logarithms of the probabilities that each model gives.

    Args:
        readers: The models, each with what makes its empty cache.
        ids: Token ids, [B, L].
        start: Place of the first token that is predicted; those before it go through the caches in one call.
        together: Largest number of tokens S that are predicted at a time.

    Yields:
        The place of the first of the S tokens, and [B, S, vocabulary] for each model, on the device of the first one.
    """
    caches = [(model, make()) for model, make in readers]
    for place in progress(range(start, ids.shape[1], together), "quality, through the cache"):
        if place == start > 1:  # The prompt's last token goes through with the first scored ones.
            for model, cache in caches:
                with evaluating(model):
                    read_through(model, cache, ids[:, : start - 1], logits_to_keep=1)
        predicted = []
        for model, cache in caches:
            with evaluating(model):
                logits = read_through(model, cache, ids[:, place - 1 : -1][:, :together])
            predicted.append(logits.float().log_softmax(-1).to(readers[0][0].device))
        yield place, predicted


def read_through(model: Any, cache: Cache, ids: Tensor, **options: Any) -> Tensor:
    """Return a model's logits [B, T, vocabulary] for token ids [B, T] that go through a cache, which keeps them."""
    return model(ids.to(model.device), **cache_argument(model, cache), use_cache=True, **options).logits


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
    return _exponential(total / (windows.shape[0] * (windows.shape[1] - 1)))


def _exponential(mean_loss: float) -> float:
    return math.exp(mean_loss) if mean_loss < LARGEST_MEAN_LOSS else math.inf
