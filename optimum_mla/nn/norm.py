"""Norms of query and key heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class HeadRMSNorm(nn.Module):
    """RMSNorm over each head's dims, one gain vector per rotary head (heads that split their dims differently)."""

    def __init__(self, heads: int, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, dim))
        self.eps = eps

    def gain(self, heads: int) -> Tensor:
        """Gains laid out for [B, heads, S, dim]: [heads, 1, dim]."""
        return self.weight.repeat_interleave(heads // self.weight.shape[0], dim=0).unsqueeze(1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, H, S, dim], normed and multiplied by its head's gain."""
        return nn.functional.rms_norm(x, x.shape[-1:], eps=self.eps) * self.gain(x.shape[1])

    def inverse_rms(self, sum_of_squares: Tensor) -> Tensor:
        """The factor that norms a head whose dims' squares add up to `sum_of_squares`."""
        return torch.rsqrt(sum_of_squares.float() / self.weight.shape[-1] + self.eps)
