"""What conversions measure on calibration tokens. Sums only: no activation outlives its forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from optimum_mla.models.spec import AttentionSpec, SourceAttention
from optimum_mla.progress import progress


@torch.no_grad()
def pair_contributions(
    model: nn.Module, spec: AttentionSpec, sources: dict[int, SourceAttention], windows: Tensor
) -> dict[int, Tensor]:
    """How much each rotary pair adds to the logits: the mean over tokens of ‖q pair‖·‖k pair‖.

    MHA2MLA (arXiv 2502.14837), section 3.1 (2-norm contribution), averaged over the query heads of a group. Norms of
    pairs do not change under rotation, so queries and keys are read before it (and behind their norms).

    Args:
        model: The source model; put into evaluation mode meanwhile.
        spec: Its family.
        sources: The layers to measure.
        windows: Token ids [N, L].

    Returns:
        By layer, [G, D/2] in float64.
    """
    sums = {
        layer: torch.zeros(source.geometry.num_key_value_heads, source.geometry.head_dim // 2, dtype=torch.float64)
        for layer, source in sources.items()
    }
    was_training = model.training
    model.eval()
    with ExitStack() as cleanup:
        cleanup.callback(model.train, was_training)
        for layer, source in sources.items():
            for hook in _contribution_hooks(source, sums[layer]):
                cleanup.callback(hook.remove)
        device = next(model.parameters()).device
        for ids in progress(windows.split(1), "rotary contributions"):
            model(ids.to(device))
    return {layer: total / windows.numel() for layer, total in sums.items()}


def _contribution_hooks(source: SourceAttention, total: Tensor) -> Iterable[Any]:
    """Hooks on one layer's queries and keys that add ‖q pair‖·‖k pair‖ of every token to `total` [G, D/2]."""
    spec, geometry = source.spec, source.geometry
    groups, head_dim = geometry.num_key_value_heads, geometry.head_dim
    query_norms: list[Tensor] = []

    def pair_norms(output: Tensor) -> Tensor:
        heads = output.detach().reshape(-1, groups, output[0, 0].numel() // (groups * head_dim), 2, head_dim // 2)
        return heads.double().norm(dim=3).mean(dim=2)  # [tokens, G, D/2]

    def read_queries(module: nn.Module, args: Any, output: Tensor) -> None:
        query_norms.append(pair_norms(output))

    def read_keys(module: nn.Module, args: Any, output: Tensor) -> None:
        total.add_((query_norms.pop() * pair_norms(output)).sum(0).to(total.device))

    readers: list[tuple[str, Callable]] = [
        (spec.query_norm or spec.query, read_queries),
        (spec.key_norm or spec.key, read_keys),
    ]
    return [source.module.get_submodule(name).register_forward_hook(reader) for name, reader in readers]
