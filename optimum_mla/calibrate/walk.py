"""A walk through the layers of a model that carries the hidden states of the source and of the converted model.

At each layer, conversions measure on these states (`optimum_mla.calibrate.layer`). The only activations that the walk
keeps are hidden states of its tokens, [N, L, d] in float32: those before and after the layer and after its attention
in the source, and those before the layer in the converted model. Where the state after the attention is not the one
before it plus a multiple of the attention's output, it also keeps this output. So its memory does not grow with the
number of layers.
One layer at a time is copied to float32, or to float64 if the model is in float64. N is the number of windows and L the
number of tokens in each. Several processes share the batches of each step, and each keeps the states of all windows.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from optimum_mla.calibrate.windows import deciding, fitted
from optimum_mla.core.processes import ALONE, Processes
from optimum_mla.families.spec import sliding_window
from optimum_mla.models.layer_source import LayerSource, for_walking
from optimum_mla.stack import bare_copy

BRANCH_TOLERANCE = 1e-4
"""The largest relative difference between what a layer adds after its attention and a multiple of its output."""
TOKENS_PER_BATCH = 4096
"""Number of tokens that go through a layer in one batch."""


class CalibrationWalk:
    """Carries the hidden states of the calibration tokens from layer to layer.

    Args:
        model: The layers of the model.
        windows: Token ids, [N, L].
        processes: The processes that share the work.

    Attributes:
        windows: The token ids.
        processes: The processes that share the work.
        layer: Index of the layer before which the walk stands.
        source: The source's states before the layer, [N, L, d].
        after_attention: The source's states after the layer's attention, [N, L, d].
        converted: The converted model's states before the layer, [N, L, d].
        mask: Whether a token attends to another, [1, 1, L, L] boolean.
        position_embeddings: cos and sin of the rotary embedding as the layer gets them, [1, L, W] each.
    """

    def __init__(self, model: LayerSource, windows: Tensor, processes: Processes = ALONE) -> None:
        self.model, self.windows, self.device, self.processes = model, windows, model.device, processes
        self.dtype = torch.promote_types(model.dtype, torch.float32)
        self.source = model.embed(windows.to(self.device)).to(self.dtype)
        self.converted = self.after_attention = self._after_layer = self.source
        self.position_ids = torch.arange(windows.shape[1], device=self.device)[None]
        self._enter(0)

    def stand_before(self, layer: int) -> None:
        """Take the modules, the mask and the rotary table of a layer, but carry no states there."""
        self.layer = layer
        if layer == self.model.num_layers:
            return
        window = sliding_window(self.model.config, layer)
        self.windowed, self.mask = window is not None, self._mask(window)
        self.position_embeddings = self.model.table(layer, self.source[:1], self.position_ids)

    def _enter(self, layer: int) -> None:
        """Take the source's states through the layer, and keep those after its attention too."""
        self.stand_before(layer)
        if layer == self.model.num_layers:
            return
        spec, own = self.model.family.spec, self.decoder_layer
        outputs: list[Tensor] = []
        middles: list[Tensor] = []

        def stages(batch: Tensor) -> tuple[Tensor, ...]:
            """Return the states after the layer, the attention's output, and what the norm after it gets, if any."""
            outputs.clear()
            middles.clear()
            return self.after(own, batch), *outputs, *middles

        with ExitStack() as stack:
            output = self.attention.register_forward_hook(lambda _, args, given: outputs.append(given[0]))
            stack.callback(output.remove)
            after = None if spec.after_attention is None else getattr(own, spec.after_attention, None)
            if after is not None:
                hook = after.register_forward_pre_hook(lambda _, args: middles.append(args[0]))
                stack.callback(hook.remove)
            found = self.processes.each(self.batches(self.source), stages)
            self._after_layer, attended, *normed = (torch.cat(parts) for parts in zip(*found, strict=True))
        # Where the feed-forward part runs beside the attention, its norm gets the state before both, or there is none.
        parallel = not normed or torch.equal(normed[0], self.source)
        self.after_attention = self.source + attended if parallel else normed[0]
        factor = _output_factor(self.after_attention[:1] - self.source[:1], attended[:1])
        self._output_factor, self._attended = factor or 1.0, attended if factor is None else None

    def _mask(self, window: int | None) -> Tensor:
        """Return a mask that is True where a token attends to another, [1, 1, L, L].

        Args:
            window: Length of the sliding window in tokens, or None for full attention.
        """
        rows = self.position_ids[0]
        distance = rows[:, None] - rows
        seen = distance >= 0
        return (seen if window is None else seen & (distance < window))[None, None]

    @property
    def decoder_layer(self) -> nn.Module:
        """Return the source's layer before which the walk stands, in the walk's dtype.

        Raises:
            RuntimeError: The walk has passed the last layer.
        """
        if self.layer == self.model.num_layers:
            raise RuntimeError("the walk has no layer left")
        return self.model.layer(self.layer, self.dtype)

    def part(self, name: str) -> nn.Module:
        """Return a part of the layer before which the walk stands, by the name that the family's spec has for it."""
        return self.decoder_layer.get_submodule(name)

    @property
    def attention(self) -> nn.Module:
        """Return the source's attention in the layer before which the walk stands."""
        return self.part(self.model.family.spec.attention)

    def input_norm(self, states: Tensor) -> Tensor:
        """Return the inputs of that attention for states before the layer: after the norm, if there is one."""
        name = self.model.family.spec.input_norm
        return states if name is None else self.part(name)(states)

    def wanted(self, windows: Tensor) -> Tensor:
        """Return the output that a converted attention should give on some windows, [B, L, d].

        With it the hidden state after the attention would be that of the source. Where the attention's output is
        normed before it is added, no output does this exactly, and that of the source is wanted.

        Args:
            windows: Indices of the windows.
        """
        if self._attended is not None:
            return self._attended[windows]
        return (self.after_attention[windows] - self.converted[windows]) / self._output_factor

    def batches(self, states: Tensor) -> tuple[Tensor, ...]:
        """Return states [N, L, ...], split along N into batches of at most `TOKENS_PER_BATCH` tokens or one window."""
        return states.split(self._windows_per_batch)

    def fitted_batches(self) -> tuple[Tensor, ...]:
        """Return the indices of the windows that fits may see, in such batches."""
        return self.batches(fitted(len(self.windows)))

    def deciding_batches(self) -> tuple[Tensor, ...]:
        """Return the indices of the windows on which candidates are compared, in such batches."""
        return self.batches(deciding(len(self.windows)))

    @property
    def _windows_per_batch(self) -> int:
        return max(1, TOKENS_PER_BATCH // self.windows.shape[1])

    @property
    def row_weights(self) -> Tensor:
        """Return the weight of each token's squared error in the attention's output, [N, L].

        It is one over the mean square of the source's state after the attention, which makes it that of an error in
        this state. The norms of later layers divide by the same size, and otherwise a few tokens with huge hidden
        states would dominate every measurement. Where the output is multiplied or normed before it is added, the error
        grows with it. Nothing can be relative to a state of zeros, so such a token has no weight.
        """
        size = self.after_attention.square().mean(-1)
        weights = torch.where(size > 0, 1 / size, 0.0)
        if self._attended is None:
            return weights * self._output_factor**2
        added = (self.after_attention - self.source).square().mean(-1)
        return weights * added / self._attended.square().mean(-1).clamp_min(torch.finfo(torch.float32).tiny)

    @property
    def _given_mask(self) -> Tensor | None:
        """Return the mask in the form that the layer's attention takes."""
        if self.model.implementation == "eager":
            lowest = torch.finfo(self.dtype).min
            return torch.zeros(self.mask.shape, dtype=self.dtype, device=self.device).masked_fill(~self.mask, lowest)
        # Without a mask the attention is causal, which is all that full attention needs and is faster.
        return self.mask if self.windowed else None

    @property
    def _keywords(self) -> dict[str, Any]:
        return {
            "position_embeddings": self.position_embeddings,
            "attention_mask": self._given_mask,
            "position_ids": self.position_ids,
        }

    def some_inputs(self, windows: Tensor, first: int, count: int) -> Tensor:
        """Return normed inputs of the attention of at most `count` tokens on the converted model's states, [T, d].

        Args:
            windows: Indices of the windows over which the tokens are spread evenly.
            first: Number of first tokens of each window that are left out, if others are left.
            count: Largest number of tokens.
        """
        later = range(min(first, self.windows.shape[1] - 1), self.windows.shape[1])
        step = -(-len(windows) * len(later) // count)
        picked = torch.arange(0, len(windows) * len(later), step)
        return self.input_norm(self.converted[windows[picked // len(later)], later.start + picked % len(later)])

    def output(self, attention: nn.Module, states: Tensor) -> Tensor:
        """Return the output of an attention for a batch of states, after the norm before the attention."""
        return attention(self.input_norm(states), **self._keywords)[0]  # type: ignore[no-any-return]

    def advance(self, attention: nn.Module | None = None) -> None:
        """Carry the hidden states of both models through the layer.

        Args:
            attention: The attention of the converted model in this layer; None takes that of the source.
        """
        if attention is None and self.converted is self.source:
            self.converted = self._after_layer
        else:
            layer = self.decoder_layer if attention is None else self.with_attention(attention)
            self.converted = self.through(layer, self.converted)
        self.source = self._after_layer
        self._enter(self.layer + 1)

    def with_attention(self, attention: nn.Module) -> nn.Module:
        """Return the layer before which the walk stands, with another attention in the place of its own."""
        layer = bare_copy(self.decoder_layer)
        walking = for_walking(bare_copy(attention), self.model.implementation).to(self.dtype)
        layer.set_submodule(self.model.family.spec.attention, walking)
        return layer

    def through(self, layer: nn.Module, states: Tensor) -> Tensor:
        """Return the states [B, L, d] after a decoder layer at the walk's place, for states before it."""
        found = self.processes.each(self.batches(states), lambda batch: (self.after(layer, batch),))
        return torch.cat([left for (left,) in found])

    def after(self, layer: nn.Module, batch: Tensor) -> Tensor:
        """Return the states after a decoder layer at the walk's place, [B, L, d], for one batch of states before it."""
        output = layer(batch, **self._keywords)
        return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]


def _output_factor(added: Tensor, attended: Tensor) -> float | None:
    """Return the factor by which an attention's output is added to the hidden state, or None if it is not so added."""
    energy = float(attended.double().square().sum())
    if not energy:
        return 1.0
    factor = float((added.double() * attended).sum()) / energy
    rounded = round(factor, 6)  # The factor of most families is exactly 1.
    rest = float((added - rounded * attended).double().square().sum()) ** 0.5
    return rounded if rounded and rest <= BRANCH_TOLERANCE * abs(rounded) * energy**0.5 else None
