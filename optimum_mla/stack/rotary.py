"""The type of a model's rotary embedding, and its tables beyond those that the model itself asks for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

FIXED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Types of rotary embeddings whose frequencies do not depend on the length of the sequence."""


def rope_type(config: Any, layer_type: str | None = None) -> str:
    """Return the type of a config's rotary embedding, such as `default` or `yarn`.

    Args:
        config: The config of a model.
        layer_type: The layers that are meant, where layers of different types have rotary embeddings of their own.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    parameters = parameters.get(layer_type) or parameters
    return str(parameters.get("rope_type", "default"))


def rotary_table(
    rotary: Callable[..., Any], like: Tensor, positions: Tensor, keywords: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """Return cos and sin, [1 or B, T, W] each, at some positions, with the frequencies of the forward pass that runs.

    Embeddings whose frequencies depend on the length (`dynamic`, `longrope`) choose them when they are called, by the
    largest position at hand. The model calls its embedding once a pass; a further call for older tokens would choose
    again, and other frequencies. So this computes the table without the choice.

    Args:
        rotary: The model's rotary embedding.
        like: A tensor of the wanted dtype and device.
        positions: Positions [1 or B, T].
        keywords: What `by_layer_type` returned for the layer.
    """
    kind: Any = type(rotary)
    plain: Any = inspect.unwrap(kind.forward)
    return plain(rotary, like, positions, **keywords)


class _KeptTable(NamedTuple):
    """A table and the frequencies that it was computed from, with the number of changes in place that they had seen."""

    cos: Tensor
    sin: Tensor
    frequencies: Tensor
    version: int


_KEPT: WeakKeyDictionary[nn.Module, dict[Hashable, _KeptTable]] = WeakKeyDictionary()


def first_positions_table(
    rotary: nn.Module, like: Tensor, tokens: int, keywords: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """Return cos and sin, [1, `tokens` or more, W] each, at the positions from 0.

    The tables of all layers and steps are the same, so they are computed once and kept as long as the embedding and its
    frequencies live. The angles of a dim lie side by side in memory.

    Args:
        rotary: The model's rotary embedding.
        like: A tensor of the wanted dtype and device. On CPUs the numbers of a dtype of 16 bits are returned in
            float32, in which the keys that they rotate are computed there.
        tokens: Number of positions.
        keywords: What `by_layer_type` returned for the layer.
    """

    def table(count: int) -> tuple[Tensor, Tensor]:
        cos, sin = rotary_table(rotary, like, torch.arange(count, device=like.device)[None], keywords)
        dtype = torch.float32 if like.device.type == "cpu" and like.dtype.itemsize == 2 else like.dtype
        return cos.mT.contiguous().mT.to(dtype), sin.mT.contiguous().mT.to(dtype)

    frequencies = _of_type(rotary, "inv_freq", keywords.get("layer_type"), None)
    if torch.compiler.is_compiling() or type(frequencies) is not Tensor or frequencies.is_inference():
        return table(tokens)
    kept = _KEPT.setdefault(rotary, {})
    key = (tuple(keywords.items()), like.dtype, like.device)
    found = kept.get(key)
    fits = found is not None and found.frequencies is frequencies and found.version == frequencies._version
    if found is None or not fits or found.cos.shape[1] < tokens:
        # A table made in inference mode could not take part in training later. Powers of two are reached seldom.
        with torch.inference_mode(False), torch.no_grad():
            cos, sin = table(1 << (tokens - 1).bit_length())
        found = kept[key] = _KeptTable(cos, sin, frequencies, frequencies._version)
    return found.cos, found.sin


def kept_tables() -> list[Tensor]:
    """Return the tables that `first_positions_table` keeps for all models that are alive."""
    return [tensor for kept in _KEPT.values() for table in kept.values() for tensor in (table.cos, table.sin)]


def by_layer_type(rotary: Callable[..., Any], layer_type: str | None) -> dict[str, Any]:
    """Return the keyword that names a layer's type to a rotary embedding which has frequencies for each type."""
    kind: Any = type(rotary)
    takes = "layer_type" in inspect.signature(inspect.unwrap(kind.forward)).parameters
    return {"layer_type": layer_type} if takes else {}


def _of_type(rotary: Any, name: str, layer_type: str | None, default: Any) -> Any:
    prefix = "".join(f"{value}_" for value in by_layer_type(rotary, layer_type).values())
    return getattr(rotary, f"{prefix}{name}", default)


def rotary_dims(rotary: Any, layer_type: str | None, default: int) -> int:
    """Return how many dims of a head a rotary embedding turns, or `default` if it does not tell."""
    frequencies = _of_type(rotary, "inv_freq", layer_type, None)
    return default if frequencies is None else 2 * len(frequencies)


def attention_scaling(rotary: Any, layer_type: str | None) -> float:
    """Return the attention factor of a rotary embedding, by which it multiplies cos and sin, as with YaRN."""
    return float(_of_type(rotary, "attention_scaling", layer_type, 1.0))
