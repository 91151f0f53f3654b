"""Hooks that other libraries put on modules."""

from __future__ import annotations

from typing import Any

from torch import nn


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
