"""Check of a model with a codec before it is written: in seconds, on a few random tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from optimum_mla.cache.codec_layer import CodecCache, CodecLayer
from optimum_mla.core.errors import VerificationError
from optimum_mla.measure.greedy import greedy
from optimum_mla.measure.quality import evaluating, read_through
from optimum_mla.models.codec import ModelCodec
from optimum_mla.stack import cache_of

ROWS = 2
NEW_TOKENS = 4


@dataclass(frozen=True)
class CodecVerification:
    """The measurements of `verify_codec`.

    Attributes:
        tokens: Number of tokens of each row of the probe.
        cache_bytes_predicted: Bytes of the coded layers' cache for the probe, from the layouts.
        cache_bytes_live: Bytes of the same layers of the live cache.
        largest_logit_difference: Largest difference of a logit of a pass without a cache from the source's, which is 0.
    """

    tokens: int
    cache_bytes_predicted: int
    cache_bytes_live: int
    largest_logit_difference: float


def codec_probe(codec: ModelCodec, vocabulary: int) -> Tensor:
    """Return seeded random token ids [B, T], of which the cache turns some into codes."""
    length = codec.exact.recent + codec.exact.together + NEW_TOKENS
    return torch.randint(vocabulary, (ROWS, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def codec_reference(source: PreTrainedModel, codec: ModelCodec) -> Tensor:
    """Return the logits of the source on the probe, without a cache, on the CPU."""
    with evaluating(source):
        ids = codec_probe(codec, source.config.vocab_size).to(source.device)
        return source(ids, use_cache=False).logits.cpu()


@torch.no_grad()
def verify_codec(model: PreTrainedModel, codec: ModelCodec, reference: Tensor) -> CodecVerification:
    """Check a model with a codec: that it is its source, what its cache weighs, and that `generate` uses it.

    Args:
        model: The model as it was loaded again, with its codec.
        codec: The codec.
        reference: What `codec_reference` returned for the source.

    Raises:
        VerificationError: With what differs, and by how much.
    """
    with evaluating(model):
        ids = codec_probe(codec, model.config.vocab_size).to(model.device)
        logits = model(ids, use_cache=False).logits.cpu()
        apart = float((logits.float() - reference.float()).abs().max())
        if not torch.equal(logits, reference):
            raise VerificationError(
                f"verify: without a cache the model is not its source: a logit differs by {apart:.3g}. Convert on the "
                "device and with the versions with which the model is loaded."
            )
        cache = codec.make_cache(model)
        exact = read_through(model, DynamicCache(config=model.config), ids).cpu()
        prompt = read_through(model, cache, ids).cpu()
        if not torch.equal(prompt, exact):
            raise VerificationError("verify: a prompt is not read exactly by the coded cache.")
        tokens = ids.shape[1]
        predicted = len(ids) * codec.cache_bytes(tokens, model.dtype.itemsize)
        live = sum(
            tensor.untyped_storage().nbytes()
            for layer in cache.layers
            if isinstance(layer, CodecLayer)
            for tensor in layer.tensors
        )
        if live != predicted:
            raise VerificationError(
                f"verify: the live cache of {len(ids)} x {tokens} tokens weighs {live} bytes, but the layouts predict "
                f"{predicted}."
            )
        made = greedy(model, ids, NEW_TOKENS)
        held = cache_of(made)
        if not isinstance(held, CodecCache) or held.get_seq_length() != tokens + NEW_TOKENS - 1:
            raise VerificationError(f"verify: generate left a {type(held).__name__} instead of a coded cache.")
        if not all(step.isfinite().all() for step in made.logits):
            raise VerificationError("verify: predictions over the coded cache are not finite. Use another dtype.")
    return CodecVerification(tokens, predicted, live, apart)
