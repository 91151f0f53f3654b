"""Weights that compute the same although an RMSNorm follows the down-projection.

The latent gets one more channel, with zero weights and the constant bias M. The denominator of the norm is then
sqrt((M² + ‖c‖²)/(r + 1)), which is almost constant: the latent is scaled by a power of two, so that ‖c‖ is at most
M/2¹⁰ for any tokens, and the relative error is at most 2⁻²¹. Such a bound exists because the input of the attention is
RMS-normed, so the weights limit ‖c‖. The channel also carries the biases of the up-projections, which DeepSeek does not
have.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

CONSTANT = 2.0**14
"""The constant M, which every dtype represents exactly."""
LARGEST_LATENT = 2.0**4
"""The upper bound of ‖c‖ after scaling, which is M/2¹⁰."""


class Projection(NamedTuple):
    """The weight of a projection, [m, d], and its bias, [m], or None."""

    weight: Tensor
    bias: Tensor | None = None


class NormedLatent(NamedTuple):
    """Projections from x to a latent and from there to an output, with a norm between them.

    Attributes:
        down: The weight of the down-projection, [r, d].
        bias: The bias of the down-projection, [r].
        gain: The gain of the norm, [r].
        up: The weight of the up-projection, [m, r].
    """

    down: Tensor
    bias: Tensor
    gain: Tensor
    up: Tensor


def constant_norm(
    down: Projection, up: Projection, longest_input: float, rank: int, dtype: torch.dtype
) -> NormedLatent:
    """Return weights that compute the same as two projections although an RMSNorm follows the first.

    The norm is neutralized by a constant channel, as the docstring of this file explains. Where `dtype` rounds the
    gain of the norm, the up-projection compensates it.

    Args:
        down: The down-projection from x, [r, d].
        up: The up-projection, [m, r].
        longest_input: An upper bound of ‖x‖.
        rank: Number of channels before the constant one. It is at least r, and channels beyond r are zero.
        dtype: The dtype in which the weights will be saved.

    Returns:
        The weights in float64.
    """
    down_bias = torch.zeros(len(down.weight), dtype=torch.float64) if down.bias is None else down.bias
    bound = torch.linalg.matrix_norm(down.weight, 2).item() * longest_input + down_bias.norm().item()
    factor = 2.0 ** math.floor(math.log2(LARGEST_LATENT / bound)) if bound > 0 else 1.0
    width = rank + 1
    # The gain of the norm multiplies the channels by the norm's denominator again, up to the rounding of the dtype. The
    # constant channel leaves the norm as about 1, or as 0 if there is no bias to carry, because a large number would
    # make its neighbours imprecise where a cache is quantized.
    root = torch.tensor(CONSTANT / math.sqrt(width), dtype=torch.float64)
    gain = root.to(dtype).double()
    small = torch.tensor(0.0 if up.bias is None else 1 / math.sqrt(width), dtype=torch.float64).to(dtype)
    made = NormedLatent(
        down=torch.zeros(width, down.weight.shape[1], dtype=torch.float64),
        bias=torch.zeros(width, dtype=torch.float64),
        gain=torch.cat([gain.repeat(rank), small.double()[None]]),
        up=torch.zeros(len(up.weight), width, dtype=torch.float64),
    )
    made.down[: len(down_bias)] = down.weight * factor
    made.bias[: len(down_bias)] = down_bias * factor
    made.bias[-1] = CONSTANT
    made.up[:, : up.weight.shape[1]] = up.weight * (root / gain) / factor
    if up.bias is not None:
        made.up[:, -1] = up.bias / ((CONSTANT / root).to(dtype) * small).double()
    return made
