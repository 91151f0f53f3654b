"""How many directions to keep."""

from __future__ import annotations

import torch
from torch import Tensor


def rank_for_energy(singular_values: Tensor, energy: float) -> int:
    """Smallest rank whose squared singular values hold the fraction `energy` of their sum.

    X-EcoMLA (arXiv 2503.11132), section 3.2, dynamic rank selection.

    Args:
        singular_values: [k], in falling order.
        energy: In (0, 1].
    """
    held = singular_values.double().square().cumsum(0)
    # Rounding may leave the last cumulative sum a hair under its own total: compare with the total itself.
    return min(int(torch.searchsorted(held, energy * held[-1]).item()) + 1, len(held))
