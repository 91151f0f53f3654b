"""Which engines can run latent attention of which shape. Facts about shapes, not about installed software."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from optimum_mla.geometry import MLAGeometry

LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Rotary scalings whose frequencies depend on the length at hand."""


@dataclass(frozen=True)
class Engine:
    """What an engine's latent attention takes.

    Attributes:
        name: As its users know it.
        kv_lora_ranks: Ranks of the latent; None takes any.
        qk_rope_head_dim: R; None takes any.
        plain_keys: It has no place for biases on queries, keys and values.
    """

    name: str
    kv_lora_ranks: tuple[int, ...] | None = None
    qk_rope_head_dim: int | None = None
    plain_keys: bool = True


ENGINES = (
    Engine("Transformers with optimum-mla", plain_keys=False),
    Engine("plain Transformers (deepseek_v3)", plain_keys=False),
    Engine("FlashMLA kernels", (512,), 64),
    Engine("FlashInfer kernels", (512, 256), 64),
    Engine("llama.cpp (deepseek2)"),
)
OWN = ENGINES[0]


def blockers(engine: Engine, layers: Sequence[MLAGeometry], rope_type: str, windows: bool) -> list[str]:
    """Why an engine cannot run a converted model; empty where it can.

    Args:
        engine: One of `ENGINES`.
        layers: Shapes of its layers.
        rope_type: Of the rotary embedding.
        windows: Some layer has a sliding window.
    """
    if engine is OWN:
        return []
    found = source_blockers(engine, layers[0], rope_type, windows)
    if any(layer.attention_form != "decoupled" for layer in layers):
        found.append("layers without a decoupled rotary key")
    if any(layer.num_rope_heads != 1 for layer in layers):
        found.append("a rotary key per head")
    if any(layer.attention_form == "decoupled" and layer.rope_cache == "rebuilt" for layer in layers):
        found.append("a rotary key that is rebuilt from the latent")
    shapes = {(layer.kv_lora_rank, layer.qk_rope_head_dim) for layer in layers}
    if len(shapes) > 1:
        found.append("layers of different ranks")
    elif not found:
        ((rank, rope),) = shapes
        if engine.kv_lora_ranks is not None and rank not in engine.kv_lora_ranks:
            found.append(f"rank {rank}, it takes {' or '.join(map(str, engine.kv_lora_ranks))}")
        if engine.qk_rope_head_dim is not None and rope != engine.qk_rope_head_dim:
            found.append(f"{rope} rotary dims, it takes {engine.qk_rope_head_dim}")
    return found


def source_blockers(engine: Engine, layer: MLAGeometry, rope_type: str, windows: bool) -> list[str]:
    """What in a source model no conversion can change."""
    if engine is OWN:
        return []
    found = []
    if layer.key_norm:
        found.append("norms on queries and keys")
    if windows:
        found.append("sliding windows")
    if rope_type in LENGTH_DEPENDENT:
        found.append(f"{rope_type} rotary scaling")
    if engine.plain_keys and (layer.query_bias or layer.key_value_bias):
        found.append("biases on queries, keys or values")
    return found
