"""Run by `torchrun` with two processes: models that are split compute, generate and train as whole ones do."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

import optimum_mla  # noqa: F401  (registers the model classes)


def whole(tensor: Any) -> Tensor:
    """A tensor with the parts of all processes."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def compared(folder: Path) -> dict[str, Any]:
    """What differs between a model that is split over the processes, by heads or by layers, and one in one piece."""
    ids = torch.arange(2, 26)[None]
    ways = {}, {"tp_plan": "auto"}, {"distributed_config": DistributedConfig(pp_size=2)}
    one, split, staged = (AutoModelForCausalLM.from_pretrained(folder, **way) for way in ways)
    with torch.no_grad():
        expected = one(ids).logits
        logits = [float((whole(model(ids).logits) - expected).abs().max()) for model in (split, staged)]
    tokens = [model.generate(ids[:, :8], max_new_tokens=8, do_sample=False).tolist() for model in (one, split, staged)]
    for model in (one, split):
        model.train()
        model(ids, labels=ids).loss.backward()
    errors = [
        float((whole(part.grad) - known.grad).norm() / known.grad.norm())
        for part, known in zip(split.parameters(), one.parameters(), strict=True)
        if known.grad is not None and known.grad.norm() > 0
    ]
    projection = split.model.layers[0].self_attn.o_proj.weight
    local = projection.to_local() if hasattr(projection, "to_local") else projection
    return {
        "logits": max(logits),
        "same tokens": tokens[0] == tokens[1] == tokens[2],
        "layers here": sum(type(layer).__name__ != "PipelineIdentityLayer" for layer in staged.model.layers),
        "gradients": max(errors),
        "share": local.numel() / one.model.layers[0].self_attn.o_proj.weight.numel(),
    }


if __name__ == "__main__":
    dist.init_process_group("gloo")
    found = {folder.name: compared(folder) for folder in sorted(Path(sys.argv[1]).iterdir())}
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.destroy_process_group()
