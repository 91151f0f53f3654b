"""The refit of a converted layer's output projection to the hidden states of the source."""

from __future__ import annotations

from torch import Tensor, nn

from optimum_mla.calibrate.states import LayerStates
from optimum_mla.calibrate.windows import held_back
from optimum_mla.ops.ridge import Healing, Regression, heal


def refit_output(layer: LayerStates, attention: nn.Module) -> Healing:
    """Refit `attention.o_proj` by ridge regression, so that the hidden states after it come close to the source's.

    The target of the regression is the source's hidden state after the attention minus the converted model's hidden
    state before it. The ridge is chosen on the held-back windows, and the final fit uses all windows. The module
    is not changed.

    Args:
        layer: The layer on the states of the walk.
        attention: The converted attention of this layer.
    """
    held = held_back(len(layer.walk.source))
    fitted = held if held.all() else ~held
    output: nn.Linear = attention.o_proj  # type: ignore[assignment]
    weight = output.weight.detach().double()
    bias = None if output.bias is None else output.bias.detach()
    fit, check = (_regression(layer, attention, bias, windows) for windows in (fitted, held))
    disjoint = not bool((held & fitted).any())
    return heal(weight, fit, check, fit + check if disjoint else fit)


def _regression(layer: LayerStates, attention: nn.Module, bias: Tensor | None, windows: Tensor) -> Regression:
    """Return the sums of the regression over some windows, [N] boolean."""
    walk = layer.walk
    contexts: list[Tensor] = []
    hook = attention.get_submodule("o_proj").register_forward_pre_hook(lambda _, args: contexts.append(args[0]))
    total: Regression | None = None
    states, targets, weights = (
        walk.batches(tensor[windows]) for tensor in (walk.converted, walk.middle, layer.row_weights)
    )
    try:
        for state, target, weight, _ in zip(
            states, targets, weights, walk.outputs(attention, walk.converted[windows]), strict=True
        ):
            wanted = target - state if bias is None else target - state - bias
            root = weight.sqrt().flatten()[:, None].double()
            context = contexts.pop().flatten(0, 1).double() * root
            wanted = wanted.flatten(0, 1).double() * root
            part = Regression(context.T @ context, context.T @ wanted, float(wanted.square().sum()), len(root))
            total = part if total is None else total + part
    finally:
        hook.remove()
    if total is None:
        raise RuntimeError("no calibration windows")
    return total
