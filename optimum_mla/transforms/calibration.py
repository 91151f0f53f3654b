"""Calibration: a walk through the layers that carries the hidden states of the source and of the converted model.

At each layer the walk offers measurements to a conversion (`LayerCalibration`): second moments, the damage of stopped
rotations, the error that a candidate leaves, and a closed-form refit of the output projection. The only activations
that it keeps are the hidden states of the calibration tokens, [N, L, d] in float32 for each of the two models, so its
memory does not grow with the number of layers. One layer at a time is copied to float32, or to float64 if the model is
in float64. N is the number of windows, L the number of tokens in each, and C = G·D/2 the number of rotary components.

Every squared error is divided by the mean square of the source's hidden state at that token. The norms of later layers
divide by it too, and otherwise a few tokens with huge hidden states would dominate every measurement.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from optimum_mla.families.spec import AttentionSpec, SourceAttention, sliding_window
from optimum_mla.ops.ridge import Healing, Regression, heal
from optimum_mla.ops.rope_mix import RopeMix, as_pairs, mixed_keys
from optimum_mla.ops.rotary import Rotation, rotate
from optimum_mla.ops.weighted import WeightedFactorization, WeightedRows

TOKENS_PER_BATCH = 4096
"""Number of tokens that go through a layer in one batch."""
HELD_BACK = 4
"""One window of this many is held back from fits and used to compare candidates."""
DECIDING_WINDOWS = 16
"""Largest number of held-back windows that are used to compare candidates."""
DAMAGE_WINDOWS = 16
"""Largest number of windows on which the damage of stopped rotations is measured."""
DAMAGE_ROWS = 32
"""Largest number of query tokens per window on which that damage is measured."""
DEFAULT_KEY_WEIGHT = 0.5
"""The initial value of `LayerCalibration.key_weight`."""


def held_back(count: int) -> Tensor:
    """Return which of `count` calibration windows are held back from fits, [count] boolean; all, if they are few."""
    held = torch.zeros(count, dtype=torch.bool)
    held[HELD_BACK - 1 :: HELD_BACK] = True
    return held if held.any() else ~held


def deciding_windows(windows: Tensor) -> Tensor:
    """Return those calibration windows [N, L] on which candidates and whole conversions are compared.

    They are `DECIDING_WINDOWS` of the windows that are held back, or fewer.
    """
    held = windows[held_back(len(windows))]
    return held[:: -(-len(held) // DECIDING_WINDOWS)]


@dataclass(frozen=True)
class LayerMoments:
    """Second moments of one layer in float64.

    Attributes:
        inputs: Covariance of the normed inputs of the attention, [d, d]. Half of a token's weight is the same for all
            tokens, and the other half is proportional to the attention that the token receives.
        input_mean: Mean of the normed inputs with the same weights, [d].
        queries: Second moments of each query head after its norm and before its rotation, [H, D, D]. The weight of a
            query is the effect of its logits on the layer's output: the variance, under its attention, of what the
            values add to the hidden state.
        key_scale: Mean square of the factor by which the key norm multiplies each key head, [G]; ones without a norm.
    """

    inputs: Tensor
    input_mean: Tensor
    queries: Tensor
    key_scale: Tensor

    @property
    def raw_inputs(self) -> Tensor:
        """Return the second moments of the inputs about zero instead of about their mean, [d, d]."""
        return self.inputs + torch.outer(self.input_mean, self.input_mean)


@dataclass(frozen=True)
class _Block:
    """The parts of a decoder layer that computes h + attention(input_norm(h)) and then h + mlp(mlp_norm(h))."""

    input_norm: nn.Module
    attention: nn.Module
    mlp_norm: nn.Module
    mlp: nn.Module


class CalibrationWalk:
    """Carries the hidden states of the calibration tokens from layer to layer.

    Args:
        model: A model or a traced one. It is not changed.
        spec: The description of the model's family.
        config: The model's config.
        windows: Token ids, [N, L].
    """

    def __init__(self, model: nn.Module, spec: AttentionSpec, config: Any, windows: Tensor) -> None:
        self.model, self.config, self._spec = model, config, spec
        embedding = model.get_submodule(f"{spec.base}.{spec.embedding}")
        weight = next(embedding.parameters())
        self.device, self.dtype = weight.device, torch.promote_types(weight.dtype, torch.float32)
        self.source = embedding(windows.to(self.device)).to(self.dtype)
        self.converted = self.source
        length = windows.shape[1]
        # The rotary embedding is copied, because one that depends on the length remembers the longest pass.
        rotary = copy.deepcopy(model.get_submodule(spec.rotary_path))
        self.position_embeddings = rotary(self.source[:1], torch.arange(length, device=self.device)[None])
        self._layer, self.middle = -1, self.source
        self._block: _Block | None = None
        self._enter(0)

    @property
    def layer(self) -> int:
        """Return the index of the layer whose inputs the states are."""
        return self._layer

    def _enter(self, layer: int) -> None:
        """Copy the layer to the walk's dtype and compute the source's states after its attention."""
        self._layer = layer
        if layer == self.config.num_hidden_layers:
            return
        spec, path = self._spec, self._spec.layer_path(layer)
        names = (spec.input_norm, spec.attention, spec.mlp_norm, spec.mlp)
        self._block = _Block(*(_working_copy(self.model.get_submodule(f"{path}.{name}"), self.dtype) for name in names))
        window = sliding_window(self.config, layer)
        self.windowed, self.mask = window is not None, self._mask(window)
        self.middle = self.source + torch.cat(list(self.outputs(self._block.attention, self.source)))

    def _mask(self, window: int | None) -> Tensor:
        """Return a mask that is True where a token attends to another, [1, 1, L, L].

        Args:
            window: Length of the sliding window in tokens, or None for full attention.
        """
        length = self.source.shape[1]
        rows = torch.arange(length, device=self.device)
        distance = rows[:, None] - rows
        seen = distance >= 0
        return (seen if window is None else seen & (distance < window))[None, None]

    @property
    def block(self) -> _Block:
        """Return the copied parts of the layer whose inputs the states are.

        Raises:
            RuntimeError: The walk has passed the last layer.
        """
        if self._block is None:
            raise RuntimeError("the walk has no layer left")
        return self._block

    def batches(self, states: Tensor) -> tuple[Tensor, ...]:
        """Return states [N, L, ...] split along N into batches of at most `TOKENS_PER_BATCH` tokens, or one window."""
        return states.split(max(1, TOKENS_PER_BATCH // states.shape[1]))

    def outputs(self, attention: nn.Module, states: Tensor) -> Iterator[Tensor]:
        """Yield the output of an attention for each batch of states, after the norm before the attention."""
        for batch in self.batches(states):
            normed = self.block.input_norm(batch)
            position_ids = torch.arange(batch.shape[1], device=self.device)[None]
            yield attention(
                normed,
                position_embeddings=self.position_embeddings,
                # Without a mask the attention is causal, which is all that full attention needs and is faster.
                attention_mask=self.mask if self.windowed else None,
                position_ids=position_ids,
            )[0]

    def calibrate(self, source: SourceAttention) -> LayerCalibration:
        """Return the measurements at the layer whose inputs the states are.

        Args:
            source: The layer's attention.
        """
        return LayerCalibration(self, source)

    def advance(self, attention: nn.Module | None = None) -> None:
        """Carry the hidden states of both models through the layer.

        Args:
            attention: The attention of the converted model in this layer; None takes that of the source.
        """
        unchanged = attention is None and self.converted is self.source
        new = self.block.attention if attention is None else _working_copy(attention, self.dtype)
        if not unchanged:
            middle = self.converted + torch.cat(list(self.outputs(new, self.converted)))
            self.converted = self._mlp(middle)
        self.source = self._mlp(self.middle)
        if unchanged:
            self.converted = self.source
        self._enter(self._layer + 1)

    def _mlp(self, states: Tensor) -> Tensor:
        block = self.block
        return torch.cat([batch + block.mlp(block.mlp_norm(batch)) for batch in self.batches(states)])


class LayerCalibration:
    """Measurements at one layer, on the hidden states that the converted layers before it produce.

    Args:
        walk: The walk, whose states are the inputs of the layer.
        source: The layer's attention.

    Attributes:
        key_weight: Weight of key errors against value errors in a joint factorization. At 1, the error of a logit
            weighs as much as its first-order effect on the output would if the value errors of all tokens were
            independent. They are not, so lower values are better; `LayerSearch` tries several.
        dtype: The dtype of the states and of the modules that are measured on them.
        memo: Results that a method computes once and uses for every candidate.
    """

    def __init__(self, walk: CalibrationWalk, source: SourceAttention) -> None:
        self.dtype = walk.dtype
        self.key_weight = DEFAULT_KEY_WEIGHT
        self.memo: dict[str, Any] = {}
        self._walk, self._source = walk, source
        self._geometry = source.geometry
        count = len(walk.source)
        self._held = held_back(count)
        self._fitted = self._held if self._held.all() else ~self._held
        self._deciding = self._held.nonzero().flatten()[:: -(-int(self._held.sum()) // DECIDING_WINDOWS)]

    def factorization(
        self, key: Any, rows: Callable[[], list[WeightedRows]], centered: bool = True
    ) -> WeightedFactorization:
        """Return the factorization of rows of weights, weighted by the moments of the layer's inputs.

        The last factorization is kept, so that other ranks of the same rows cost nothing.

        Args:
            key: Identifies the rows, together with `key_weight` and `centered`.
            rows: Returns the rows.
            centered: Whether biases after the latent carry the mean of the inputs. Otherwise the latent carries it.
        """
        key = (key, self.key_weight, centered)
        if self.memo.get("factorization", (None, None))[0] != key:
            self.memo["factorization"] = (
                key,
                WeightedFactorization(rows(), self.moments.inputs if centered else self.moments.raw_inputs),
            )
        return self.memo["factorization"][1]

    @cached_property
    def _row_weights(self) -> Tensor:
        """Return the weight of each token's squared error, [N, L], which the docstring of this module explains."""
        return self._walk.middle.square().mean(-1).clamp_min(torch.finfo(torch.float32).tiny).reciprocal()

    @property
    def logit_scale(self) -> float:
        """Return the factor of the logits: D^-½ times the square of the rotary embedding's attention factor."""
        return self._geometry.head_dim**-0.5 * self._source.attention_scaling**2

    def _heads(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return normed states [B, L, d], queries [B, H, L, D], keys [B, G, L, D] and values [B, G, L, D].

        Queries and keys are taken after their norms and before their rotation.
        """
        spec, attention = self._source.spec, self._walk.block.attention
        x = self._walk.block.input_norm(states)
        query, key, value = (
            attention.get_submodule(name)(x).unflatten(-1, (-1, self._geometry.head_dim)).transpose(1, 2)
            for name in (spec.query, spec.key, spec.value)
        )
        if spec.query_norm is not None:
            query = attention.get_submodule(spec.query_norm)(query)
        if spec.key_norm is not None:
            key = attention.get_submodule(spec.key_norm)(key)
        return x, query, key, value

    def _attend(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the rotated queries, the rotated keys, and the attention weights [B, H, L, L]."""
        half = self._geometry.head_dim // 2
        cos, sin = (table[..., :half].unsqueeze(1) for table in self._walk.position_embeddings)
        rotation = Rotation(cos, sin)
        query, key = rotate(query, rotation), rotate(key, rotation)
        share = query.shape[1] // key.shape[1]
        # The attention factor of the rotary embedding is already part of cos and sin.
        logits = query @ key.repeat_interleave(share, dim=1).mT * self._geometry.head_dim**-0.5
        return query, key, logits.masked_fill(~self._walk.mask, float("-inf")).softmax(dim=-1)

    @cached_property
    def _output_moments(self) -> Tensor:
        """Return W_O,hᵀ W_O,h of every query head h in the dtype of the states, [H, D, D]."""
        return output_moments(self._source).to(self._walk.dtype)

    def _value_spread(self, weights: Tensor, value: Tensor) -> Tensor:
        """Return the variance, under each query's attention, of what the values add to the hidden state, [B, H, L]."""
        value = value.repeat_interleave(weights.shape[1] // value.shape[1], dim=1)  # [B, H, L, D]
        size = ((value @ self._output_moments) * value).sum(-1, keepdim=True)
        mean = weights @ value
        mean_size = ((mean @ self._output_moments) * mean).sum(-1)
        return ((weights @ size)[..., 0] - mean_size).clamp_min(0)

    @cached_property
    def moments(self) -> LayerMoments:
        """Return the second moments of the layer, which are gathered in one pass over all windows."""
        g, d, device = self._geometry, self._geometry.hidden_size, self._walk.device
        inputs, mean = (torch.zeros(*size, dtype=torch.float64, device=device) for size in ((d, d), (d,)))
        queries = torch.zeros(g.num_attention_heads, g.head_dim, g.head_dim, dtype=torch.float64, device=device)
        key_scale = torch.zeros(g.num_key_value_heads, dtype=torch.float64, device=device)
        rows = self._row_weights / self._row_weights.mean()
        total = 0.0
        batches = self._walk.batches
        for states, row in zip(batches(self._walk.converted), batches(rows), strict=True):
            x, query, key, value = self._heads(states)
            _, _, weights = self._attend(query, key)
            received = (weights * row[:, None, :, None]).sum((1, 2)) / g.num_attention_heads  # [B, L]
            share = (0.5 + 0.5 * received).flatten().double()[:, None]
            flat = x.flatten(0, 1).double()
            inputs += (flat * share).T @ flat
            mean += (flat * share).sum(0)
            total += float(share.sum())
            effect = (self._value_spread(weights, value) * row[:, None]).double()[..., None]  # [B, H, L, 1]
            heads = query.double()
            queries += ((heads * effect).mT @ heads).sum(0)
            key_scale += self._key_factors(x).double().square().sum((0, 2))
        mean = mean / total
        count = rows.numel()
        return LayerMoments(inputs / total - mean[:, None] * mean, mean, queries / count, key_scale / count)

    def _key_factors(self, x: Tensor) -> Tensor:
        """Return the factor by which the key norm multiplies each key, [B, G, L]; ones without a key norm."""
        spec, attention = self._source.spec, self._walk.block.attention
        key = attention.get_submodule(spec.key)(x).unflatten(-1, (-1, self._geometry.head_dim)).transpose(1, 2)
        if spec.key_norm is None:
            return torch.ones_like(key[..., 0])
        norm = attention.get_submodule(spec.key_norm)
        return torch.rsqrt(key.square().mean(-1) + norm.variance_epsilon)  # type: ignore[operator]

    def contribution(self) -> Tensor:
        """Return the 2-norm contribution of each rotary pair (MHA2MLA, arXiv 2502.14837, section 3.1), [G, D/2].

        It is the mean over the tokens of the product of the norms of the query's pair and of the key's pair, averaged
        over the query heads of a group. It is measured on the states of the source model. Rotation is left out because
        it does not change the norm of a pair.
        """
        g = self._geometry
        total = torch.zeros(g.num_key_value_heads, g.head_dim // 2, dtype=torch.float64, device=self._walk.device)
        for states in self._walk.batches(self._walk.source):
            _, query, key, _ = self._heads(states)
            sizes = [heads.double().unflatten(-1, (2, -1)).norm(dim=-2) for heads in (query, key)]  # [B, X, L, D/2]
            grouped = sizes[0].unflatten(1, (g.num_key_value_heads, -1)).mean(2)
            total += (grouped * sizes[1]).sum((0, 2))
        return total / self._walk.source.shape[:2].numel()

    def damage(self, mix: RopeMix) -> Tensor:
        """Return the damage that is done if a component stops rotating, [C].

        The damage is the squared change of the logits, summed over query heads and averaged over query tokens. Softmax
        ignores a shift that all logits of a query share, so the change is taken as its variance under the query's
        attention. It is weighted like the queries in `moments.queries`, and includes the scale of the logits.

        Args:
            mix: The mixing of the key heads that makes the components.
        """
        g, walk = self._geometry, self._walk
        windows = torch.arange(0, len(walk.converted), -(-len(walk.converted) // DAMAGE_WINDOWS), device=walk.device)
        length = walk.converted.shape[1]
        rows = torch.linspace(length / DAMAGE_ROWS, length - 1, min(DAMAGE_ROWS, length), device=walk.device).long()
        row_weights = self._row_weights / self._row_weights.mean()
        pairs = g.head_dim // 2
        total = torch.zeros(g.num_key_value_heads * pairs, dtype=torch.float64, device=walk.device)
        first, second = torch.triu_indices(4, 4, device=walk.device)
        twice = torch.where(first == second, 1.0, 2.0).double()
        scaling, half = self._source.attention_scaling, pairs
        cos, sin = (table[..., :half].unsqueeze(1).double() for table in walk.position_embeddings)
        for window in windows:
            x, query, key, value = self._heads(walk.converted[window, None])
            _, _, weights = self._attend(query, key)
            effect = self._value_spread(weights, value)[0] * row_weights[window]  # [H, L]
            factors = self._key_factors(x)[0].double()  # [G, L]
            # The components are mixed from keys without the factor of the key norm, because each head has its own.
            raw = key[0].double() / factors[..., None] if g.key_norm else key[0].double()
            still = mixed_keys(mix, raw.mT) * scaling
            turn = torch.complex(cos, sin)[0, 0].T.repeat(g.num_key_value_heads, 1)  # [C, L]
            turned = mixed_keys(mix, raw.mT) * turn
            parts = torch.stack([turned.real, turned.imag, still.real, still.imag])  # [4, C, L]
            share, products = g.num_attention_heads // g.num_key_value_heads, None
            for head in range(g.num_attention_heads):
                group = head // share
                if products is None or (g.key_norm and head % share == 0):
                    u = parts * factors[group] if g.key_norm else parts
                    products = u[first] * u[second]  # [10, C, L]
                attention = weights[0, head, rows].double()  # [rows, L]
                means = torch.einsum("rt,act->arc", attention, u)
                squares = torch.einsum("rt,nct->nrc", attention, products)
                covariance = squares - means[first] * means[second]  # [10, rows, C]
                pair = as_pairs(query[0, head, rows].double().T[None])[0]  # [D/2, rows]
                moving = mix.queries[:, :, group].T[..., None] * pair  # [G, D/2, rows]
                turning = torch.complex(cos, sin)[0, 0, rows].T
                a, b = (moving * turning).flatten(0, 1).T, (moving * scaling).flatten(0, 1).T  # [rows, C]
                reader = torch.stack([a.real, a.imag, -b.real, -b.imag])
                change = (reader[first] * reader[second] * covariance * twice[:, None, None]).sum(0)
                total += (change * effect[head, rows, None].double()).sum(0).clamp_min(0)
        return total * g.head_dim**-1.0 / (len(windows) * len(rows))

    def error(self, attention: nn.Module) -> float:
        """Return the error that an attention leaves in the hidden state after it, on held-back windows.

        It is the root mean square over tokens of the error's size relative to that of the source's state; infinite if
        it is not finite.
        """
        walk = self._walk
        target = (walk.middle - walk.converted)[self._deciding]
        output = torch.cat(list(walk.outputs(attention, walk.converted[self._deciding])))
        squares = (output - target).double().square().mean(-1) * self._row_weights[self._deciding]
        error = float(squares.mean().sqrt())
        return error if math.isfinite(error) else math.inf

    def heal(self, attention: nn.Module) -> Healing:
        """Refit `attention.o_proj` by ridge regression, so that the hidden states after it come close to the source's.

        The target of the regression is the source's hidden state after the attention minus the converted model's hidden
        state before it. The ridge is chosen on the held-back windows, and the final fit uses all windows. The module
        is not changed.

        Args:
            attention: The converted attention of this layer.
        """
        output: nn.Linear = attention.o_proj  # type: ignore[assignment]
        weight = output.weight.detach().double()
        bias = None if output.bias is None else output.bias.detach()
        fitted = self._regression(attention, bias, self._fitted)
        held = self._regression(attention, bias, self._held)
        disjoint = not bool((self._held & self._fitted).any())
        return heal(weight, fitted, held, fitted + held if disjoint else fitted)

    def _regression(self, attention: nn.Module, bias: Tensor | None, windows: Tensor) -> Regression:
        walk = self._walk
        contexts: list[Tensor] = []
        hook = attention.get_submodule("o_proj").register_forward_pre_hook(lambda _, args: contexts.append(args[0]))
        total: Regression | None = None
        states, targets, weights = (
            walk.batches(tensor[windows]) for tensor in (walk.converted, walk.middle, self._row_weights)
        )
        try:
            for state, target, weight, _ in zip(
                states, targets, weights, walk.outputs(attention, walk.converted[windows]), strict=True
            ):
                wanted = target - state if bias is None else target - state - bias
                root = weight.sqrt().flatten()[:, None].double()
                context = contexts.pop().flatten(0, 1).double() * root
                wanted = wanted.flatten(0, 1).double() * root
                part = Regression(context.T @ context, context.T @ wanted, float(wanted.square().sum()), len(root))
                total = part if total is None else total + part
        finally:
            hook.remove()
        if total is None:
            raise RuntimeError("no calibration windows")
        return total


def output_moments(source: SourceAttention) -> Tensor:
    """Return W_O,hᵀ W_O,h of every query head h, [H, D, D].

    With it, the error of a value gives the squared size of the error in the hidden state.
    """
    heads = source.output()["o_proj.weight"].double().unflatten(1, (source.geometry.num_attention_heads, -1))
    return torch.einsum("ohd,ohe->hde", heads, heads)


def _working_copy(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy of a module in evaluation mode, with `sdpa` attention, which is causal if it gets no mask."""
    clone = copy.deepcopy(module).to(dtype).eval()
    config = getattr(clone, "config", None)
    if config is not None:
        config = copy.copy(config)
        config._attn_implementation = "sdpa"  # type: ignore[union-attr]
        clone.config = config
    return clone
