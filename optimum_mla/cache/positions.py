"""The positions of cached tokens, for keys that are rotated after they are read from the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from optimum_mla.core.errors import InvalidValueError


class CachedPositions:
    """One position for each token of a cache, shared by all layers.

    As long as the positions rise by one from token to token, alike in all rows, two numbers hold them; else a tensor.

    Attributes:
        tokens: How many tokens have positions here.
        start: The position of the first token, where the positions are consecutive.
        values: All positions, [1 or B, T], where they are not; or None.
    """

    def __init__(self) -> None:
        self.tokens, self.start = 0, 0
        self.values: Tensor | None = None

    @property
    def consecutive(self) -> bool:
        """Return whether the positions rise by one from token to token, alike in all rows."""
        return self.values is None

    def note(self, seen: int, length: int, new: Tensor | None) -> None:
        """Take in the positions of new tokens, once a step: later layers of the same step find them there.

        Args:
            seen: Tokens in the calling layer before the step.
            length: S, how many tokens are new.
            new: Their positions, [1 or B, S]; None continues those before.

        Raises:
            InvalidValueError: The cache holds tokens whose positions nobody told, and the new ones do not continue
                them.
        """
        if self.tokens == seen + length:
            return
        if self.tokens < seen:
            if new is not None and not bool((new[:, 0] == self._next(seen - self.tokens)).all()):
                raise InvalidValueError(
                    "position_ids",
                    new[:, 0].tolist(),
                    f"{self._next(seen - self.tokens)}, because the cache was filled without positions",
                    "Fill a cache from make_cache() by calling the model.",
                )
            self._append(None, seen - self.tokens)
        elif self.tokens > seen:
            raise InvalidValueError(
                "cache",
                f"a layer of {seen} tokens",
                f"{self.tokens} tokens in every layer",
                "Crop the cache as a whole.",
            )
        self._append(new, length)

    def _next(self, skipped: int = 0) -> int:
        """Return the position after the last one, past some tokens that nobody told of."""
        last = self.start + self.tokens - 1 if self.values is None else int(self.values[:, -1].max())
        return last + 1 + skipped

    def _append(self, new: Tensor | None, length: int) -> None:
        if self.values is None:
            if new is None:
                self.tokens += length
                return
            if not torch.compiler.is_compiling():  # a traced program cannot look at the numbers
                start = int(new[0, 0]) if not self.tokens else self.start
                expected = start + self.tokens + torch.arange(length, device=new.device)
                if bool((new == expected).all()):
                    self.start, self.tokens = start, self.tokens + length
                    return
            self.values = self.start + torch.arange(self.tokens, device=new.device)[None]
        if new is None:
            new = self.values[:, -1:] + 1 + torch.arange(length, device=self.values.device)
        batch = max(len(self.values), len(new))
        self.values = torch.cat([self.values.expand(batch, -1), new.to(self.values).expand(batch, -1)], dim=1)
        self.tokens += length

    def last(self, count: int, device: torch.device) -> Tensor:
        """Return the positions of the newest `count` tokens, [1 or B, count]."""
        if self.values is None:
            first = self.start + self.tokens - count
            return torch.arange(first, first + count, device=device)[None]
        return self.values[:, self.tokens - count :].to(device)

    def cut(self, tokens: int) -> None:
        """Keep the oldest tokens only."""
        self.tokens = min(self.tokens, tokens)
        if self.values is not None:
            self.values = self.values[:, : self.tokens]

    def rows(self, indices: Tensor) -> None:
        """Keep the given rows of the batch, in that order, or those that a boolean mask [B] selects."""
        if self.values is not None and len(self.values) > 1:
            self.values = self.values[indices.to(self.values.device)]

    def repeat(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        if self.values is not None and len(self.values) > 1:
            self.values = self.values.repeat_interleave(repeats, dim=0)
