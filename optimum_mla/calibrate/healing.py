"""The refit of a converted layer's output projection to the hidden states of the source."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from optimum_mla.calibrate.walk import CalibrationWalk
from optimum_mla.ops.ridge import Healing, Regression, heal


def refit_output(walk: CalibrationWalk, attention: nn.Module) -> Healing:
    """Refit `attention.o_proj` by ridge regression, so that the hidden states after it come close to the source's.

    The target of the regression is `CalibrationWalk.wanted`: the output with which the hidden state after the attention
    would be the source's. The fit sees the fitted windows, and the ridge is chosen on windows that are held back. The
    module is not changed.

    Args:
        walk: The walk, which stands before the layer.
        attention: The converted attention of this layer.
    """
    output: nn.Linear = attention.o_proj  # type: ignore[assignment]
    bias = None if output.bias is None else output.bias.detach()
    fit = _regression(walk, attention, bias, walk.fitted_batches())
    check = _regression(walk, attention, bias, walk.deciding_batches())
    return heal(output.weight.detach().double(), fit, check)


def _regression(
    walk: CalibrationWalk, attention: nn.Module, bias: Tensor | None, batches: Sequence[Tensor]
) -> Regression:
    """Return the sums of the regression over some windows, whose indices come in batches."""
    output: nn.Linear = attention.o_proj  # type: ignore[assignment]
    contexts: list[Tensor] = []
    hook = output.register_forward_pre_hook(lambda _, args: contexts.append(args[0]))
    weights = walk.row_weights

    def sums(windows: Tensor) -> tuple[Tensor | float, ...]:
        walk.output(attention, walk.converted[windows])
        wanted = walk.wanted(windows) if bias is None else walk.wanted(windows) - bias
        root = weights[windows].sqrt().flatten()[:, None].double()
        context = torch.cat(contexts).flatten(0, 1).double() * root
        contexts.clear()
        wanted = wanted.flatten(0, 1).double() * root
        return context.T @ context, context.T @ wanted, float(wanted.square().sum()), len(root)

    try:
        return Regression(*walk.processes.summed(batches, sums))
    finally:
        hook.remove()
