"""How the predictions of a model depend on the keys and values that it reads of old tokens.

If what is read of an old token is off by δ, the predictions move by ½ δᵀ H δ nats of divergence to second order. H is
the sum of Jᵀ (diag(p) - p pᵀ) J over the predictions, for their probabilities p and the Jacobian J of their logits: the
Fisher information, which is also the Gauss-Newton matrix. With signs ε drawn at random, z = √p ∘ ε - p (√p · ε) has
E z zᵀ = diag(p) - p pᵀ. So one backward pass with z as the gradients of the logits gives gradients g with
E (g · δ)² = δᵀ H δ for all old tokens and all layers at once: the signs of different predictions are independent.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from optimum_mla.cache.codec_layer import ExactTokens
from optimum_mla.calibrate.old_tokens import OldTokensAttention
from optimum_mla.calibrate.perplexity import VOCABULARY_ROWS, head_parts
from optimum_mla.calibrate.walk import CalibrationWalk
from optimum_mla.core.processes import Terms
from optimum_mla.core.progress import progress

GRADIENT_TOKENS = 4096
"""Number of tokens through which gradients flow, rounded down to whole windows, of which there is one at least."""
STATE_NUMBERS = 2**29
"""Largest number of numbers in the kept states of all layers together; there are fewer tokens where they were more."""
TOKENS_AT_ONCE = 256
"""Number of tokens whose predictions are computed at once."""


class Gradients:
    """Keeps the states of some windows on a walk through the source, and takes gradients the same way back.

    Args:
        walk: A walk before the first layer, in which no layer is converted.
        exact: Which tokens are never read from codes.

    Attributes:
        before: The gradients of the states of the windows before the layer that was told of last, [N, L, d].
    """

    before: Tensor

    def __init__(self, walk: CalibrationWalk, exact: ExactTokens) -> None:
        self._walk, self._exact = walk, exact
        length, width = walk.source.shape[1:]
        room = STATE_NUMBERS // (walk.model.num_layers * width)
        count = min(len(walk.windows), max(1, min(GRADIENT_TOKENS, room) // length))
        self._windows = torch.arange(count) * len(walk.windows) // count  # evenly spread
        self._states: list[Tensor] = []

    def advance(self) -> None:
        """Keep the states before the layer at which the walk stands, and carry the walk through it."""
        self._states.append(self._walk.source[self._windows].cpu())
        self._walk.advance()

    def of_layers(
        self, layers: tuple[int, ...], title: str, reached: tuple[int, Tensor] | None = None
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield, from the last layer to the first, the gradients of what is read of old tokens.

        Called once, when the walk has passed the last layer.

        Args:
            layers: The layers to tell of.
            title: What the progress of this is called.
            reached: A layer down to which an earlier run came, and what `before` was then; None starts at the
                predictions.

        Yields:
            The index of a layer, the w = 2·G·D numbers [key ; value] of each token before the key's rotation, [T, w],
            and the gradients g of what is read in their place, [T, w]. With errors δ that are independent from token to
            token, each prediction moves by half the mean of (g · δ)² over these tokens.
        """
        walk = self._walk
        last = walk.model.num_layers if reached is None else reached[0]
        after = self._at_the_end() if reached is None else list(reached[1].split(1))
        for layer in progress(range(last - 1, min(layers) - 1, -1), title, main=True):
            walk.stand_before(layer)
            given = list(zip(self._states.pop(layer).split(1), after, strict=True))
            step = partial(self._passed, self._reading() if layer in layers else walk.decoder_layer)
            after, *read = (list(parts) for parts in zip(*walk.processes.each(given, step), strict=True))
            self.before = torch.cat(after)
            if read:
                vectors, gradients = (torch.cat(parts).flatten(0, 1) for parts in read)
                yield layer, vectors, gradients

    def _at_the_end(self) -> list[Tensor]:
        """Return the gradients of the states after the last layer, [1, L, d] for each window."""
        norm, head = self._walk.model.final_norm().to(self._walk.dtype), self._walk.model.head()
        found = self._walk.processes.each(range(len(self._windows)), partial(self._of_predictions, norm, head))
        return [gradient for (gradient,) in found]

    def _reading(self) -> nn.Module:
        """Return the layer at which the walk stands, with an attention that tells how it reads old tokens."""
        walk = self._walk
        return walk.with_attention(
            OldTokensAttention(walk.model.attention(walk.layer), self._exact, walk.mask, walk.dtype)
        )

    def _of_predictions(self, norm: nn.Module, head: nn.Module, window: int) -> tuple[Tensor]:
        """Return the gradient of the states after the last layer in one window, [1, L, d]."""
        walk, weight = self._walk, head.get_parameter("weight")
        generator, parts = torch.Generator().manual_seed(window), []
        for part in walk.source[self._windows[window]].split(TOKENS_AT_ONCE):
            with torch.enable_grad():
                states = part.detach().requires_grad_()
                normed = norm(states)
            # The head has no graph, which would hold all of its weight in the dtype of the states.
            headed = torch.cat(list(head_parts(normed, head)), dim=-1).detach().requires_grad_()
            with torch.enable_grad():
                logits = walk.model.family.spec.logits(walk.model.config, headed)
            p = logits.detach().softmax(-1)
            signs = torch.randint(2, p.shape, generator=generator, dtype=torch.int8).to(p.device, p.dtype) * 2 - 1
            roots = p.sqrt() * signs
            (found,) = torch.autograd.grad(logits, headed, roots - p * roots.sum(-1, keepdim=True))
            rows = zip(found.split(VOCABULARY_ROWS, dim=-1), weight.split(VOCABULARY_ROWS), strict=True)
            through = sum(gradient @ part.to(gradient.dtype) for gradient, part in rows)
            parts += torch.autograd.grad(normed, states, through)
        return (torch.cat(parts)[None].cpu(),)

    def _passed(self, layer: nn.Module, given: tuple[Tensor, Tensor]) -> Terms:
        """Return the gradient of the states before a layer, and what its attention reads, and the gradients of that.

        The latter two are returned for a layer whose attention is an `OldTokensAttention`.

        Args:
            layer: The layer at which the walk stands.
            given: The states of a window before the layer, and the gradient of those after it, [1, L, d] each.
        """
        walk = self._walk
        attention = layer.get_submodule(walk.model.family.spec.attention)
        states, after = (part.to(walk.device) for part in given)
        with torch.enable_grad():
            states.requires_grad_()
            reached = walk.after(layer, states)
            if not isinstance(attention, OldTokensAttention):
                return tuple(found.cpu() for found in torch.autograd.grad(reached, states, after))
            before, *read = torch.autograd.grad(reached, [states, attention.logits, attention.context], after)
        return before.cpu(), attention.vectors.detach(), attention.gradients(*read).detach()
