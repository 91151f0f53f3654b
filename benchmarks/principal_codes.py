"""Codes of an unconverted model's keys and values in their principal axes, with bits by component.

This is the idea of KVTC (arXiv 2511.01815) in the setting of this project: keys before their rotation and values, all
heads together but keys and values apart, are turned into their principal axes, and each component gets the bits that
make the squared error least. The codes and the allocation are those of `optimum_mla.codec`, so what differs from a
coded latent is the transform alone. `PrincipalCodes` has axes for each layer and codes every token. `AllLayers` is
closer to KVTC: its axes run over all layers together, first and newest tokens stay as they are, and a prompt is coded
after it was read. KVTC's entropy coding is left out, as for all other caches here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, DynamicLayer
from transformers.models.llama.modeling_llama import rotate_half

from optimum_mla.codec.fit import CodeTable, allocate_bits
from optimum_mla.stack import cache_argument

SINKS = 4
"""First tokens of a window that the axes and steps are not fitted to."""


def unrotated(model: Any, keys: Tensor, seen: int, back: bool = False) -> Tensor:
    """Return keys [B, G, S, D] with their rotary embedding taken off, or put on again.

    Args:
        model: The model whose rotary embedding it is.
        keys: Keys of neighbouring tokens.
        seen: Position of the first of them.
        back: Whether to rotate instead.
    """
    positions = torch.arange(seen, seen + keys.shape[2], device=keys.device)[None]
    cos, sin = model.model.rotary_emb(keys, positions)
    return keys * cos[:, None] + rotate_half(keys) * (sin if back else -sin)[:, None]


@dataclass(frozen=True)
class Axes:
    """The principal axes of the keys or of the values of a layer, and the errors of codes along them.

    Attributes:
        axes: Orthonormal columns in order of falling energy, [G D, G D].
        mean: Mean of the states, [G D].
        table: The codes of each component.
    """

    axes: Tensor
    mean: Tensor
    table: CodeTable

    @classmethod
    def fit(cls, states: Tensor) -> Axes:
        """Return the axes of states [T, G D]."""
        centred = (states - states.mean(0)).double()
        axes = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1).to(states.dtype)
        components = centred.to(states.dtype) @ axes
        return cls(axes, states.mean(0), CodeTable.fit(components, states.new_ones(len(axes))))

    def rounded(self, states: Tensor, widths: Tensor) -> Tensor:
        """Return states [B, G, S, D] after coding with so many bits for each component, [G D]."""
        flat = states.transpose(1, 2).flatten(2) - self.mean
        steps = self.table.steps.gather(1, widths[:, None])[:, 0].to(states.dtype)
        half = 2.0 ** (widths - 1)
        codes = ((flat @ self.axes) / steps - 0.5).round().clamp(-half, half - 1)
        back = torch.where(widths > 0, (codes + 0.5) * steps, 0.0) @ self.axes.T + self.mean
        return back.unflatten(2, (states.shape[1], -1)).transpose(1, 2)


class PrincipalLayer(DynamicLayer):
    """The cache of one layer, which codes what arrives.

    Args:
        model: The source model.
        axes: The axes of its keys and of its values in this layer.
        share: Bits of the codes, as a share of 16 bits per number.
        sinks: First tokens of the sequence that are kept as they are.
    """

    def __init__(self, model: Any, axes: tuple[Axes, Axes], share: float, sinks: int) -> None:
        super().__init__()
        self.model, self.axes, self.sinks = model, axes, sinks
        errors = torch.cat([one.table.errors for one in axes])
        self.widths = allocate_bits(errors, int(share * 16 * len(errors))).split([len(one.axes) for one in axes])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Code the new tokens, store them, and return all tokens."""
        seen = self.get_seq_length()
        kept = max(0, self.sinks - seen)
        keys = self.axes[0].rounded(unrotated(self.model, key_states, seen), self.widths[0])
        keys = unrotated(self.model, keys, seen, back=True)
        values = self.axes[1].rounded(value_states, self.widths[1])
        keys, values = (
            torch.cat([before[:, :, :kept], after[:, :, kept:]], dim=2)
            for before, after in ((key_states, keys), (value_states, values))
        )
        return super().update(keys, values, *args, **kwargs)


def samples_of(model: Any, windows: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the unrotated keys and the values of windows without their first tokens, [T, G D] each, by layer."""
    samples: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in range(model.config.num_hidden_layers)]
    for ids in windows.split(8):
        cache = DynamicCache(config=model.config)
        model(ids, **cache_argument(model, cache), logits_to_keep=1)
        for layer, kept in zip(cache.layers, samples, strict=True):
            for states, into in zip((unrotated(model, layer.keys, 0), layer.values), kept, strict=True):
                into.append(states[:, :, SINKS:].transpose(1, 2).flatten(2).flatten(0, 1))
    return [(torch.cat(keys), torch.cat(values)) for keys, values in samples]


class PrincipalCodes:
    """The principal axes of all layers of a model.

    Args:
        model: A model with rotary positions, as Llama's.
        windows: Token ids to calibrate on, [N, L].
    """

    @torch.no_grad()
    def __init__(self, model: Any, windows: Tensor) -> None:
        self.model = model
        self.layers = [(Axes.fit(keys), Axes.fit(values)) for keys, values in samples_of(model, windows)]

    def cache(self, share: float, sinks: int) -> Cache:
        """Return an empty cache that codes every token after the first ones in a share of its 16-bit bytes."""
        return Cache(layers=[PrincipalLayer(self.model, axes, share, sinks) for axes in self.layers])


class AllLayers:
    """The principal axes of the keys of all layers together, and those of the values.

    Args:
        model: A model with rotary positions, as Llama's.
        windows: Token ids to calibrate on, [N, L].
    """

    @torch.no_grad()
    def __init__(self, model: Any, windows: Tensor) -> None:
        self.model = model
        keys, values = zip(*samples_of(model, windows), strict=True)
        self.axes = Axes.fit(torch.cat(keys, dim=1)), Axes.fit(torch.cat(values, dim=1))

    def cache(self, share: float, sinks: int, recent: int) -> AllLayersCache:
        """Return an empty cache that codes a prompt in a share of its 16-bit bytes, but for first and newest tokens."""
        return AllLayersCache(self, share, sinks, recent)


class AllLayersCache(DynamicCache):
    """A cache that codes its first pass, the prompt, before the second one. Later tokens stay as they are.

    Args:
        codes: The axes.
        share: Bits of the codes, as a share of 16 bits per number.
        sinks: First tokens that are kept as they are.
        recent: Newest tokens of the prompt that are kept as they are.
    """

    def __init__(self, codes: AllLayers, share: float, sinks: int, recent: int) -> None:
        super().__init__(config=codes.model.config)
        self.codes, self.sinks, self.recent, self.coded = codes, sinks, recent, 0
        self.read = False  # whether the first pass is over
        errors = torch.cat([one.table.errors for one in codes.axes])
        self.widths = allocate_bits(errors, int(share * 16 * len(errors))).split([len(one.axes) for one in codes.axes])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new tokens and return all tokens; code the first pass when the second one begins."""
        if layer_idx == 0 and not self.read and self.get_seq_length():
            self.read = True
            self._code(self.get_seq_length() - self.recent)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _code(self, stop: int) -> None:
        self.coded = max(0, stop - self.sinks)
        layers: list[Any] = list(self.layers)
        old = slice(self.sinks, self.sinks + self.coded)
        keys = torch.cat([unrotated(self.codes.model, layer.keys[:, :, old], self.sinks) for layer in layers], dim=1)
        values = torch.cat([layer.values[:, :, old] for layer in layers], dim=1)
        rounded = (
            axes.rounded(part, bits)
            for axes, part, bits in zip(self.codes.axes, (keys, values), self.widths, strict=True)
        )
        keys, values = (part.split(layers[0].keys.shape[1], dim=1) for part in rounded)
        for layer, key, value in zip(layers, keys, values, strict=True):
            layer.keys[:, :, old] = unrotated(self.codes.model, key, self.sinks, back=True)
            layer.values[:, :, old] = value
