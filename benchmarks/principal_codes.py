"""Codes of an unconverted model's keys and values in their principal axes, with bits by component.

This is the idea of KVTC (arXiv 2511.01815) in the setting of this project: keys before their rotation and values, all
heads together but keys and values apart, are turned into their principal axes, and each component gets the bits that
make the squared error least. The codes and the allocation are those of `optimum_mla.codec`, so what differs from a
coded latent is the transform alone. KVTC's entropy coding and its window of newest tokens are left out, as for all
other caches here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, DynamicLayer
from transformers.models.llama.modeling_llama import rotate_half

from optimum_mla.codec.fit import CodeTable, allocate_bits

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


class PrincipalCodes:
    """The principal axes of all layers of a model.

    Args:
        model: A model with rotary positions, as Llama's.
        windows: Token ids to calibrate on, [N, L].
    """

    @torch.no_grad()
    def __init__(self, model: Any, windows: Tensor) -> None:
        self.model = model
        samples: list[list[list[Tensor]]] = [[[], []] for _ in range(model.config.num_hidden_layers)]
        for ids in windows.split(8):
            cache = DynamicCache(config=model.config)
            model(ids, past_key_values=cache, logits_to_keep=1)
            for layer, kept in zip(cache.layers, samples, strict=True):
                for states, into in zip((unrotated(model, layer.keys, 0), layer.values), kept, strict=True):
                    into.append(states[:, :, SINKS:].transpose(1, 2).flatten(2).flatten(0, 1))
        self.layers = [(Axes.fit(torch.cat(keys)), Axes.fit(torch.cat(values))) for keys, values in samples]

    def cache(self, share: float, sinks: int) -> Cache:
        """Return an empty cache that codes every token behind the first ones in a share of its 16-bit bytes."""
        return Cache(layers=[PrincipalLayer(self.model, axes, share, sinks) for axes in self.layers])
