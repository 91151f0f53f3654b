"""The shapes of latent attention that engines can run. Nothing here looks at installed software."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from optimum_mla.core.geometry import MLAGeometry
from optimum_mla.stack import FIXED_ROPE_TYPES


@dataclass(frozen=True)
class Engine:
    """The shapes that the latent attention of an engine supports."""

    name: str
    kv_lora_ranks: tuple[int, ...] | None = None  # None stands for all
    qk_rope_head_dim: int | None = None  # None stands for all
    plain_keys: bool = True  # whether biases on queries, keys and values are not supported
    format: str | None = "deepseek_v3"  # of `mla-export` that it loads; None for native models of this package


ENGINES = (
    Engine("Transformers with optimum-mla", plain_keys=False, format=None),
    Engine("plain Transformers (deepseek_v3)", plain_keys=False),
    Engine("FlashMLA kernels", (512,), 64),
    Engine("FlashInfer kernels", (512, 256), 64),
    Engine("llama.cpp (deepseek2)", format="gguf"),
)
OWN = ENGINES[0]


def blockers(engine: Engine, layers: Sequence[MLAGeometry], rope_type: str, windows: bool) -> list[str]:
    """Return the reasons why an engine cannot run a converted model; empty if it can.

    Args:
        engine: One of `ENGINES`.
        layers: Shapes of the layers of the model.
        rope_type: Type of the rotary embedding, as in the config.
        windows: Whether some layer has a sliding window.
    """
    if engine is OWN:
        return []
    decoupled = [layer for layer in layers if layer.attention_form == "decoupled"]
    reasons = {
        "layers without a decoupled rotary key": len(decoupled) < len(layers),
        "a rotary key per head": any(layer.num_rope_heads != 1 for layer in layers),
        "a rotary key that is rebuilt from the latent": any(layer.rope_cache == "rebuilt" for layer in decoupled),
        "latents without a norm": engine.format == "gguf" and not all(layer.latent_norm for layer in decoupled),
    }
    found = source_blockers(engine, layers[0], rope_type, windows) + [why for why, holds in reasons.items() if holds]
    shapes = {(layer.kv_lora_rank, layer.qk_rope_head_dim) for layer in layers}
    if len(shapes) > 1:
        return [*found, "layers of different ranks"]
    if found:
        return found
    ((rank, rope),) = shapes
    if engine.kv_lora_ranks is not None and rank not in engine.kv_lora_ranks:
        found.append(f"rank {rank} (it supports {' or '.join(map(str, engine.kv_lora_ranks))})")
    if engine.qk_rope_head_dim is not None and rope != engine.qk_rope_head_dim:
        found.append(f"{rope} rotary dims (it supports {engine.qk_rope_head_dim})")
    if found and (size := padding(engine, layers[0])) is not None:
        found[-1] += f", which mla-export --pad-to {size} gives"
    return found


def padding(engine: Engine, layer: MLAGeometry) -> str | None:
    """Return the least sizes, such as `512+64`, to which a layer could be padded for an engine, or None."""
    least = layer.kv_lora_rank + (0 if layer.latent_norm else 1)  # The constant channel comes to the latent.
    ranks = [rank for rank in engine.kv_lora_ranks or () if rank >= least]
    rope = engine.qk_rope_head_dim or layer.qk_rope_head_dim
    return f"{min(ranks)}+{rope}" if ranks and rope >= layer.qk_rope_head_dim else None


def source_blockers(engine: Engine, layer: MLAGeometry, rope_type: str, windows: bool) -> list[str]:
    """Return the reasons why an engine cannot run any conversion of a source model.

    Args:
        engine, rope_type, windows: As for `blockers`.
        layer: Shape of a layer of the source model.
    """
    if engine is OWN:
        return []
    # llama.cpp computes the frequencies of this format from one base, and the export folds scaling into factors.
    rope_types = ("default",) if engine.format == "gguf" else FIXED_ROPE_TYPES
    reasons = {
        "norms on queries and keys": layer.key_norm,
        "sliding windows": windows,
        f"{rope_type} rotary scaling": rope_type not in rope_types,
        "biases on queries, keys or values": engine.plain_keys and (layer.query_bias or layer.key_value_bias),
    }
    return [why for why, holds in reasons.items() if holds]
