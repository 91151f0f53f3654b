"""Perplexity."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_mla.progress import progress

LARGEST_MEAN_LOSS = 700.0
"""exp of more overflows a float."""
TOKENS_PER_BATCH = 4096
"""Tokens in one forward pass: bounds the memory of the logits."""


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: Tensor) -> float:
    """exp of the mean negative log-likelihood per predicted token over non-overlapping windows.

    Every window starts from an empty context and predicts all its tokens but the first.

    Args:
        model: A causal language model.
        windows: Token ids [N, L], L at least 2.
    """
    was_training = model.training
    model.eval()
    batch = max(1, TOKENS_PER_BATCH // windows.shape[1])
    total = 0.0
    for ids in progress(windows.split(batch), "perplexity"):
        ids = ids.to(model.device)
        logits = model(ids, use_cache=False).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        total += losses.item()
    model.train(was_training)
    mean = total / (windows.shape[0] * (windows.shape[1] - 1))
    return math.exp(mean) if mean < LARGEST_MEAN_LOSS else math.inf
