"""Norms of query and key heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

NORM_EPS = 1e-6
"""The number that norms of query and key heads add to the mean square in models whose config does not say."""


class HeadRMSNorm(nn.Module):
    """RMSNorm of each head or of all heads together.

    Args:
        heads: Number of gain vectors, each of which serves as many consecutive heads.
        dim: Dims of a head.
        eps: Added to the mean square.
        normed_dim: The root mean square is that of the first so many dims, the source head's own; dims after them are
            linear combinations of those and get the same factor. None takes all.
        joint: Whether the root mean square is that of all heads together.
    """

    def __init__(self, heads: int, dim: int, eps: float, normed_dim: int | None = None, joint: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, dim))
        self.eps, self.normed_dim, self.joint = eps, normed_dim or dim, joint

    def forward(self, x: Tensor) -> Tensor:
        """Return x [B, H, S, dim], normed and multiplied by its head's gain."""
        gain = self.weight.repeat_interleave(x.shape[1] // self.weight.shape[0], dim=0).unsqueeze(1)  # [H, 1, dim]
        dims = (1, 3) if self.joint else (3,)
        return x * inverse_rms(x[..., : self.normed_dim], self.eps, dims) * gain


def inverse_rms(heads: Tensor, eps: float, dims: tuple[int, ...]) -> Tensor:
    """Return the factor that gives heads a root mean square of one over some dims, which stay with size one."""
    squares = heads.to(torch.promote_types(heads.dtype, torch.float32)).square()
    return torch.rsqrt(squares.mean(dims, keepdim=True) + eps).to(heads.dtype)
