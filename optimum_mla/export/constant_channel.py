"""Weights that compute the same although an RMSNorm follows the down-projection.

The latent gets one more channel, with zero weights and the constant bias M. The denominator of the norm is then
sqrt((M² + ‖c‖²)/(r + 1)), which is almost constant: the latent is scaled by a power of two, so that ‖c‖ is at most
M/2¹⁰ for any tokens, and the relative error is at most 2⁻²¹. Such a bound exists because the input of the attention is
RMS-normed, so the weights limit ‖c‖. The channel also carries the biases of the up-projections, which DeepSeek does not
have.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CONSTANT = 2.0**14
"""The constant M, which every dtype represents exactly."""
LARGEST_LATENT = 2.0**4
"""The upper bound of ‖c‖ after scaling, which is M/2¹⁰."""


def constant_norm(
    down_name: str,
    up_name: str,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    longest_input: float,
    rank: int,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Return weights that compute up·(down·x + down_bias) + up_bias although an RMSNorm follows the down-projection.

    The norm is neutralized by a constant channel, as the docstring of this file explains. Where `dtype` rounds the
    gain of the norm, the up-projection compensates it.

    Args:
        down_name: DeepSeek's name of the down-projection without `_proj`, `kv_a` or `q_a`.
        up_name: DeepSeek's name of the up-projection, `kv_b_proj` or `q_b_proj`.
        down: The weight of the down-projection, [r, d].
        down_bias: The bias of the down-projection, [r], or None.
        up: The weight of the up-projection, [m, r].
        up_bias: The bias of the up-projection, [m], or None.
        longest_input: An upper bound of ‖x‖.
        rank: Number of channels before the constant one. It is at least r, and channels beyond r are zero.
        dtype: The dtype in which the weights will be saved.

    Returns:
        The parameters of both projections and of the norm by DeepSeek's names, in float64.
    """
    if down_bias is None:
        down_bias = torch.zeros(len(down), dtype=torch.float64)
    bound = torch.linalg.matrix_norm(down, 2).item() * longest_input + down_bias.norm().item()
    factor = 2.0 ** math.floor(math.log2(LARGEST_LATENT / bound)) if bound > 0 else 1.0
    width = rank + 1
    # The gain of the norm multiplies the channels by the norm's denominator again, up to the rounding of the dtype. The
    # constant channel leaves the norm as about 1, or as 0 if there is no bias to carry, because a large number would
    # make its neighbours imprecise where a cache is quantized.
    root = torch.tensor(CONSTANT / math.sqrt(width), dtype=torch.float64)
    gain = root.to(dtype).double()
    small = torch.tensor(0.0 if up_bias is None else 1 / math.sqrt(width), dtype=torch.float64).to(dtype)
    constant = ((CONSTANT / root).to(dtype) * small).double()
    made = {
        f"{down_name}_proj.weight": torch.zeros(width, down.shape[1], dtype=torch.float64),
        f"{down_name}_proj.bias": torch.zeros(width, dtype=torch.float64),
        f"{down_name}_layernorm.weight": torch.cat([gain.repeat(rank), small.double()[None]]),
        f"{up_name}.weight": torch.zeros(len(up), width, dtype=torch.float64),
    }
    made[f"{down_name}_proj.weight"][: len(down)] = down * factor
    made[f"{down_name}_proj.bias"][: len(down)] = down_bias * factor
    made[f"{down_name}_proj.bias"][-1] = CONSTANT
    made[f"{up_name}.weight"][:, : up.shape[1]] = up * (root / gain) / factor
    if up_bias is not None:
        made[f"{up_name}.weight"][:, -1] = up_bias / constant
    return made
