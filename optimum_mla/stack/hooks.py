"""Hooks that other libraries put on modules."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def only_moves_inputs(module: nn.Module) -> bool:
    """Return whether accelerate's hook on a module, if it has one, leaves its weights in place.

    `dispatch_model` puts a hook on every module of a spread model. It moves a module's inputs to the device of its
    weights; where it also offloads the weights, they are there only while the module is called.
    """
    hook: Any = getattr(module, "_hf_hook", None)
    if hook is None:
        return "forward" not in vars(module)
    from accelerate.hooks import AlignDevicesHook, SequentialHook

    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    return all(isinstance(part, AlignDevicesHook) and not part.offload for part in hooks)


def bare_copy(module: nn.Module) -> nn.Module:
    """Return a copy of a module and its submodules without accelerate's hooks.

    Weights in memory are shared, but belong to parameters of the copy, so that `to` leaves the original as it is.
    Weights that accelerate has offloaded are read. The module's other hooks stay. A linear layer with quantized weights
    becomes a plain one with what its weights stand for.
    """
    from accelerate.utils import align_module_device

    if is_quantized_linear(module):
        return _dense(module)
    clone = copy.copy(module)
    state = vars(clone)
    if hasattr(module, "_hf_hook"):
        for name in ("_hf_hook", "_old_forward", "forward"):
            state.pop(name, None)
    state.update({name: value.copy() for name, value in state.items() if isinstance(value, dict)})
    with align_module_device(module):
        clone._parameters = {
            name: None if value is None else nn.Parameter(value.detach(), value.requires_grad)
            for name, value in module._parameters.items()
        }
    clone._modules = {name: None if part is None else bare_copy(part) for name, part in module._modules.items()}
    return clone


def is_quantized_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer of a library that holds other things than plain numbers as weights."""
    if not hasattr(module, "in_features") or not hasattr(module, "out_features"):
        return False
    weight = getattr(module, "weight", None)
    return not (isinstance(weight, nn.Parameter) and type(weight.data) is Tensor and weight.is_floating_point())


@torch.no_grad()
def _dense(module: Any) -> nn.Linear:
    """Return a plain linear layer that computes what a quantized one does, by what that makes of single inputs."""
    tensors = [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point()]
    like = getattr(module, "compute_dtype", None) or (tensors[0].dtype if tensors else torch.float32)
    device = next(iter((*module.parameters(), *module.buffers()))).device
    offset = module(torch.zeros(1, module.in_features, dtype=like, device=device))
    biased = bool(offset.any())
    columns = module(torch.eye(module.in_features, dtype=like, device=device))  # [in, out]
    made = nn.Linear(module.in_features, module.out_features, bias=biased, device="meta")
    made.weight = nn.Parameter((columns - offset).T.contiguous(), requires_grad=False)
    if biased:
        made.bias = nn.Parameter(offset[0], requires_grad=False)
    return made


def is_offloaded(module: nn.Module) -> bool:
    """Return whether accelerate has offloaded parameters of a module, submodules not counted."""
    from accelerate.utils import has_offloaded_params

    return has_offloaded_params(module)


def returns_to_memory(model: nn.Module) -> bool:
    """Return whether the weights of a model are in memory once accelerate's hooks are removed."""
    for module in model.modules():
        if not is_offloaded(module):
            if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
                return False
            continue
        hook: Any = module._hf_hook
        if any(hook.original_devices[name].type == "meta" for name, _ in module.named_parameters(recurse=False)):
            return False
    return True


def remove_spread(model: nn.Module) -> dict[str, Any] | None:
    """Remove accelerate's hooks from a model, and return the `device_map` that it was spread by, or None."""
    from accelerate.hooks import remove_hook_from_submodules

    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        remove_hook_from_submodules(model)
    return getattr(model, "hf_device_map", None)


def spread(model: nn.Module, device_map: dict[str, Any] | None) -> None:
    """Spread a model by a `device_map` that `remove_spread` returned."""
    if device_map is not None:
        from accelerate import dispatch_model

        dispatch_model(model, device_map)
