"""A check of the layers that adapters of PEFT were meant for, because a converted model has other ones than its source.

PEFT takes a list of names, adapts the layers that have one of them, and raises only if there is none at all. Of
`["q_proj", "k_proj", "v_proj"]`, which suits most source models, a converted model has `q_proj` alone.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from optimum_mla.nn import LatentAttention
from optimum_mla.nn.projections import LATENT_PROJECTIONS


def warn_of_unmatched(model: nn.Module, configs: dict[str, Any], attention: str) -> None:
    """Warn of target names that name nothing in converted layers, and name the layers of the latent.

    A bare name such as `k_proj` is one of them too if only attentions that are not converted have it, unless other
    names are those of layers of the latent. Patterns, and configs without target modules, have none.
    """
    modules = dict(model.named_modules())
    unconverted = tuple(
        f"{name}."
        for name, module in modules.items()
        if name.rpartition(".")[2] == attention and not isinstance(module, LatentAttention)
    )

    def names_something(target: str, bare_counts: bool) -> bool:
        named = [name for name in modules if name == target or name.endswith(f".{target}")]
        return any(bare_counts or "." in target or not name.startswith(unconverted) for name in named)

    for config in configs.values():
        targets = getattr(config, "target_modules", None)
        if targets is None or isinstance(targets, str):
            continue
        knows = any(target.rpartition(".")[2] in LATENT_PROJECTIONS for target in targets)
        unmatched = sorted(target for target in targets if not names_something(target, knows))
        if not unmatched:
            continue
        found = {name.rpartition(".")[2] for name in modules}
        latent = [name for name in LATENT_PROJECTIONS if name in found]
        warnings.warn(
            f"target_modules: {', '.join(unmatched)} of {', '.join(sorted(config.target_modules))} name nothing in the "
            f"converted layers, so no adapters train there. The layers of the latent are {', '.join(latent)}; "
            "mla_lora_config(model), from optimum_mla.recovery, targets them.",
            stacklevel=2,
        )
