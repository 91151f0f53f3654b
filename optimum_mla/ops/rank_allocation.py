"""Choice of a rank by the energy that it keeps."""

from __future__ import annotations

import torch
from torch import Tensor


def rank_for_energy(singular_values: Tensor, energy: float) -> int:
    """Return the smallest rank whose squared singular values hold the share `energy` of their sum.

    This is the dynamic rank selection of X-EcoMLA (arXiv 2503.11132, section 3.2).

    Args:
        singular_values: Singular values in falling order, [k].
        energy: Share to keep, above 0 and up to 1.
    """
    held = singular_values.double().square().cumsum(0)
    # The share is taken of the last cumulative sum, because rounding may make another total larger than it.
    return min(int(torch.searchsorted(held, energy * held[-1]).item()) + 1, len(held))
