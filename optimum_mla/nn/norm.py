"""Norms of query and key heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class HeadRMSNorm(nn.Module):
    """RMSNorm of each head, one gain vector per rotary head (heads that split their dims differently).

    Args:
        heads: K.
        dim: Dims of a head.
        eps: Added to the mean square.
        normed_dim: The root mean square is that of the first so many dims, the source head's own; dims behind them are
            linear combinations of those and get the same factor. None takes all.
    """

    def __init__(self, heads: int, dim: int, eps: float, normed_dim: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, dim))
        self.eps, self.normed_dim = eps, normed_dim or dim

    def forward(self, x: Tensor) -> Tensor:
        """Return x [B, H, S, dim], normed and multiplied by its head's gain."""
        gain = self.weight.repeat_interleave(x.shape[1] // self.weight.shape[0], dim=0).unsqueeze(1)  # [H, 1, dim]
        return x * inverse_rms(x[..., : self.normed_dim], self.eps).unsqueeze(-1) * gain


def inverse_rms(heads: Tensor, eps: float) -> Tensor:
    """Return the factor [...] that gives heads [..., dim] a root mean square of one."""
    squares = heads.to(torch.promote_types(heads.dtype, torch.float32)).square()
    return torch.rsqrt(squares.mean(-1) + eps).to(heads.dtype)
