"""The test whether the weight of a linear layer may be used without calling the layer."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from optimum_mla.stack import only_moves_inputs


def is_plain(linear: nn.Module) -> bool:
    """Return whether the product with a linear layer's weight, plus its bias, is exactly what calling it would give.

    It is not where something acts only when the module is called (an adapter, a quantizer, a hook, an offload hook of
    accelerate) or where the weight is no plain tensor (a parametrization, a subclass such as torchao's or DTensor).
    """
    if type(linear) is not nn.Linear or not only_moves_inputs(linear):
        return False
    tensors = [linear.weight] if linear.bias is None else [linear.weight, linear.bias]
    kinds = {type(kind) for tensor in tensors for kind in (tensor, tensor.data)}
    plain = kinds <= {nn.Parameter, Tensor} and all(t.is_floating_point() and not t.is_meta for t in tensors)
    hooks = (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks)
    return plain and not any(hooks) and not _has_any_global_hook()
