"""Check that a model does what it must, before it is written: in seconds, on a few random tokens.

- The live cache weighs what the shapes predict, byte by byte.
- Logits that come through the cache, a prompt and then single tokens, are those of one pass without a cache.
- `generate` chooses the same tokens with the cache as without it, and leaves a filled cache.
- Where the computation must have stayed the same, the logits are those of the model that this one was made from.

A model that fails any of these would be silently wrong: a cache that is swallowed under a name that nobody knows, for
example, gives a fine perplexity and no memory at all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from optimum_mla.cache.settings import CacheSettings
from optimum_mla.core.errors import VerificationError
from optimum_mla.families.spec import sliding_window
from optimum_mla.measure.greedy import greedy
from optimum_mla.measure.memory import live_cache_bytes
from optimum_mla.measure.quality import evaluating, read_through
from optimum_mla.measure.sizes import predicted_cache_bytes
from optimum_mla.models.family_table import is_converted
from optimum_mla.stack import cache_of

PROBE_ROWS = 2
PROBE_TOKENS = 24
PROBE_PROMPT = 16
"""Tokens of the probe that go through the cache in one call; the others follow one by one."""
NEW_TOKENS = 8
PROBE_SEED = 0
UNQUANTIZED = {"bits": 16, "rope_bits": 16}
TOLERANCES = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.1}
"""The largest relative difference of logits that rounding may cause, by the dtype of the weights.

A cache that is not read, or positions that are off by one, cause differences of about one.
"""
LARGEST_DEVIATION = 10
"""A single logit may be off by so many times the root mean square of all deviations."""


@dataclass(frozen=True)
class Verification:
    """The measurements of `verify`.

    Attributes:
        cache_bytes_predicted: Bytes of the model's own cache for the probe, from shapes and settings.
        cache_bytes_live: Bytes of the live cache.
        cached_logits_error: Relative difference of the logits that come through the cache to those of one pass.
        generated_tokens: Tokens that `generate` chose alike with and without the cache.
        reference_error: Relative difference of the logits to those of the reference, or None where there is none.
        tolerance: The largest relative difference that was allowed.
    """

    cache_bytes_predicted: int
    cache_bytes_live: int
    cached_logits_error: float
    generated_tokens: int
    reference_error: float | None
    tolerance: float


def tolerance_of(*dtypes: torch.dtype) -> float:
    """Return the largest relative difference of logits that rounding in any of these dtypes may cause."""
    return max(TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16]) for dtype in dtypes)


@torch.no_grad()
def reference_logits(model: PreTrainedModel) -> Tensor:
    """Return a model's logits [B, S, vocabulary] on the probe, on the CPU, for `verify` of what is made from it."""
    with evaluating(model):
        return _logits(model, _probe(model)).cpu()


@torch.no_grad()
def verify(model: PreTrainedModel, reference: Tensor | None = None, tolerance: float | None = None) -> Verification:
    """Check a model's cache and generation, and its logits where a reference is given.

    Args:
        model: A converted model, or an export of one.
        reference: Logits that the model must have, from `reference_logits`; None where its computation was to change.
        tolerance: The largest relative difference of logits; None takes that of the model's dtype in `TOLERANCES`.

    Raises:
        VerificationError: With what differs, and by how much.
    """
    allowed = tolerance_of(model.dtype) if tolerance is None else tolerance
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        ids = _probe(model)
        full = _logits(model, ids)
        if not full.isfinite().all():
            raise VerificationError(
                "verify: the model's logits are not finite. Check the weights, or use another dtype."
            )
        reference_error = None
        if reference is not None:
            reference_error = _difference(full, reference)
            _check(reference_error, allowed, "logits differ from those of the model that it was made from")
        predicted, live = _check_bytes(model, ids)
        errors = [_difference(_through_cache(model, ids, make()), full) for make in _exact_caches(model)]
        _check(max(errors), allowed, "logits through the cache differ from those of one pass without a cache")
        if _is_quantized(model):
            error = _quantized_difference(model, ids)
            _check(error, allowed, "logits over the coded cache differ from those over a decoded copy of it")
        tokens = _check_generation(model, ids, allowed)
    return Verification(predicted, live, max(errors), tokens, reference_error, allowed)


@torch.no_grad()
def check_reference(model: PreTrainedModel, reference: Tensor, what: str) -> None:
    """Check the logits of a model alone, which may be a wrapper around a converted language model.

    Args:
        model: The model.
        reference: Logits that it must have, from `reference_logits`.
        what: What is wrong where it has others, in words.

    Raises:
        VerificationError: It has others.
    """
    with evaluating(model):
        _check(_difference(_logits(model, _probe(model)), reference), tolerance_of(model.dtype), what)


def _probe(model: PreTrainedModel) -> Tensor:
    """Return seeded random token ids [B, S] within the model's vocabulary and context."""
    config: Any = model.config.get_text_config()
    length = min(PROBE_TOKENS, getattr(config, "max_position_embeddings", None) or PROBE_TOKENS)
    generator = torch.Generator().manual_seed(PROBE_SEED)
    return torch.randint(config.vocab_size, (PROBE_ROWS, length), generator=generator).to(model.device)


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits.float()


def _difference(found: Tensor, expected: Tensor) -> float:
    """Return the relative difference of logits, without the shift of each row that no softmax sees."""
    expected = expected.to(found.device)
    centred = expected - expected.mean(-1, keepdim=True)
    off = found - expected
    size = centred.norm()
    return float((off - off.mean(-1, keepdim=True)).norm() / (size if size > 0 else 1.0))


def _check(error: float, allowed: float, what: str) -> None:
    if not error <= allowed:  # also where it is no number
        raise VerificationError(f"verify: {what} (relative difference {error:.3g}, allowed {allowed:g}).")


def _is_quantized(model: PreTrainedModel) -> bool:
    settings = getattr(model.config, "latent_cache", None)
    return is_converted(model.config) and CacheSettings.from_dict(settings).quantized


def _exact_caches(model: PreTrainedModel) -> list[Callable[[], Cache]]:
    """Return what makes the caches that lose nothing: Transformers' own, and a converted model's without codes."""
    config: Any = model.config
    caches: list[Callable[[], Cache]] = [lambda: DynamicCache(config=config)]
    if is_converted(config):
        unquantized: Any = model
        caches.append(lambda: unquantized.make_cache(**UNQUANTIZED))
    return caches


def _own_cache(model: Any) -> Cache:
    """Return an empty cache as the model makes it for itself."""
    return model.make_cache() if is_converted(model.config) else DynamicCache(config=model.config)


def _feed(model: PreTrainedModel, ids: Tensor, cache: Cache) -> Tensor:
    return read_through(model, cache, ids).float()


def _check_bytes(model: PreTrainedModel, ids: Tensor) -> tuple[int, int]:
    """Fill Transformers' own cache and the model's; return the predicted and the live bytes of the latter."""
    config: Any = model.config
    windowed = any(sliding_window(config, layer) is not None for layer in range(config.num_hidden_layers))
    tokens, found = ids.shape[1], (0, 0)
    for name, cache in (("16bit", DynamicCache(config=config)), ("default", _own_cache(model))):
        # Windowed layers keep a view of the whole prompt until the next step.
        steps = 1 if windowed else 0
        _feed(model, ids[:, : tokens - steps], cache)
        if steps:
            _feed(model, ids[:, tokens - steps :], cache)
        sizes = predicted_cache_bytes(config, name, tokens, model.dtype.itemsize, steps)
        if sizes is None:
            raise VerificationError("verify: the size of this model's cache cannot be predicted.")
        least, spare = (round(size * len(ids)) for size in sizes)
        live = live_cache_bytes(cache)
        if not least <= live <= least + (spare if steps else 0):
            raise VerificationError(
                f"verify: the live {type(cache).__name__} of {len(ids)} x {tokens} tokens weighs {live} bytes, but the "
                f"shapes predict {least}."
            )
        found = least, live
    return found


def _through_cache(model: PreTrainedModel, ids: Tensor, cache: Cache) -> Tensor:
    """Return the probe's logits where a prompt and then single tokens went through the cache."""
    prompt = max(1, min(PROBE_PROMPT, ids.shape[1] - 1))
    pieces = [ids[:, :prompt], *ids[:, prompt:].split(1, dim=1)]
    return torch.cat([_feed(model, piece, cache) for piece in pieces], dim=1)


def _quantized_difference(model: PreTrainedModel, ids: Tensor) -> float:
    """Return how far a step over the coded blocks is from the same step over one decoded copy of the cache."""
    cache = _own_cache(model)
    _feed(model, ids[:, :-1], cache)
    decoded = Cache(layers=copy.deepcopy(cache.layers))
    return _difference(_feed(model, ids[:, -1:], cache), _feed(model, ids[:, -1:], decoded))


def _check_generation(model: Any, ids: Tensor, allowed: float) -> int:
    """Compare greedy tokens with and without a cache; return how many were the same."""
    new = max(1, min(NEW_TOKENS, ids.shape[1] - 1))
    prompt = ids[:, : ids.shape[1] - new]
    exact = model.make_cache(**UNQUANTIZED) if _is_quantized(model) else None
    with_cache, without = greedy(model, prompt, new, cache=exact), greedy(model, prompt, new, use_cache=False)
    held = cache_of(with_cache)
    filled = None if held is None else int(held.get_seq_length())
    if filled != ids.shape[1] - 1:
        raise VerificationError(
            f"verify: after {ids.shape[1]} tokens, generate left a cache of {filled} tokens instead of "
            f"{ids.shape[1] - 1}."
        )
    for step, second in enumerate(without.logits):
        chosen, other = (with_cache.sequences[:, prompt.shape[1] + step], without.sequences[:, prompt.shape[1] + step])
        if torch.equal(chosen, other):
            continue
        rows = torch.arange(len(ids), device=chosen.device)
        margin = (second[rows, other] - second[rows, chosen]).float().max()
        if not margin <= LARGEST_DEVIATION * allowed * second.float().std(-1).mean():
            raise VerificationError(
                f"verify: generation with the cache chooses other tokens than without it, from step {step + 1} on "
                f"({chosen.tolist()} instead of {other.tolist()})."
            )
        return step * len(ids)  # two tokens were as likely to within rounding; what follows cannot be compared
    return new * len(ids)
