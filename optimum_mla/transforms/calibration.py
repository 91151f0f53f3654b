"""Calibration: one walk through the layers, with the source's hidden states beside the converted prefix's own.

At each layer the walk gives what a conversion wants to know (`LayerCalibration`): second moments, the damage of stopped
rotations, the error that a candidate leaves, a closed-form refit of the output projection. The only activations that it
keeps are the hidden states of the calibration tokens, [N, L, d] in float32 for each of the two streams, so memory does
not grow with the number of layers; one layer at a time is copied to float32 (or kept in float64). Letters: N windows,
L tokens in each, C = G·D/2 rotary components.

Every squared error is weighted by one over the mean square of the source's hidden state at that token: the norms of
later layers divide by it, and a few tokens with huge states would otherwise decide alone.
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
"""Tokens that go through a layer together."""
HELD_BACK = 4
"""One window in so many is held back from fits and decides between candidates."""
DECIDING_WINDOWS = 16
"""At most so many of the windows held back are used to compare candidates."""
DAMAGE_WINDOWS = 16
DAMAGE_ROWS = 32
"""Windows, and query tokens in each, on which the damage of stopped rotations is measured."""
DEFAULT_KEY_WEIGHT = 0.5
"""`LayerCalibration.key_weight` before any was tried."""


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
    """Second moments of one layer, float64.

    Attributes:
        inputs: Covariance of the normed inputs [d, d]; tokens count half by number, half by the attention they get.
        input_mean: Their mean [d], weighted likewise.
        queries: Of each query head behind its norm and before its rotation, [H, D, D]. A query counts by how much the
            layer's output moves with its logits: the spread, under its attention, of what the values add to the state.
        key_scale: Mean square [G] of the factor by which a key norm multiplies each key head; ones without a norm.
    """

    inputs: Tensor
    input_mean: Tensor
    queries: Tensor
    key_scale: Tensor

    @property
    def raw_inputs(self) -> Tensor:
        """Second moment [d, d] about zero."""
        return self.inputs + torch.outer(self.input_mean, self.input_mean)


@dataclass(frozen=True)
class _Block:
    """One decoder layer in float32: h + attention(input_norm(h)), then h + mlp(mlp_norm(h))."""

    input_norm: nn.Module
    attention: nn.Module
    mlp_norm: nn.Module
    mlp: nn.Module


class CalibrationWalk:
    """Carries the calibration tokens' hidden states from layer to layer.

    Args:
        model: A model or a traced one; put into no other state.
        spec: Its family.
        config: Its config.
        windows: Token ids [N, L].
    """

    def __init__(self, model: nn.Module, spec: AttentionSpec, config: Any, windows: Tensor) -> None:
        self.model, self.config, self._spec = model, config, spec
        embedding = model.get_submodule(f"{spec.base}.{spec.embedding}")
        weight = next(embedding.parameters())
        self.device, self.dtype = weight.device, torch.promote_types(weight.dtype, torch.float32)
        self.source = embedding(windows.to(self.device)).to(self.dtype)
        self.converted = self.source
        length = windows.shape[1]
        # A copy: one that follows the length would otherwise remember the windows' length in the model.
        rotary = copy.deepcopy(model.get_submodule(spec.rotary_path))
        self.position_embeddings = rotary(self.source[:1], torch.arange(length, device=self.device)[None])
        self._layer, self.middle = -1, self.source
        self._block: _Block | None = None
        self._enter(0)

    @property
    def layer(self) -> int:
        """The layer that the states stand before."""
        return self._layer

    def _enter(self, layer: int) -> None:
        """Copy the layer to float32 and compute the source's states behind its attention."""
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
        """[1, 1, L, L], True where a token sees another."""
        length = self.source.shape[1]
        rows = torch.arange(length, device=self.device)
        distance = rows[:, None] - rows
        seen = distance >= 0
        return (seen if window is None else seen & (distance < window))[None, None]

    @property
    def block(self) -> _Block:
        """The layer that the states stand before."""
        if self._block is None:
            raise RuntimeError("the walk has no layer left")
        return self._block

    def batches(self, states: Tensor) -> tuple[Tensor, ...]:
        """States in parts of about `TOKENS_PER_BATCH` tokens."""
        return states.split(max(1, TOKENS_PER_BATCH // states.shape[1]))

    def outputs(self, attention: nn.Module, states: Tensor) -> Iterator[Tensor]:
        """The attention's output on normed states, batch by batch."""
        for batch in self.batches(states):
            normed = self.block.input_norm(batch)
            position_ids = torch.arange(batch.shape[1], device=self.device)[None]
            yield attention(
                normed,
                position_embeddings=self.position_embeddings,
                # Without a window the attention is causal by itself, and faster so.
                attention_mask=self.mask if self.windowed else None,
                position_ids=position_ids,
            )[0]

    def calibrate(self, source: SourceAttention) -> LayerCalibration:
        """What a conversion of the layer before which the states stand may ask for."""
        return LayerCalibration(self, source)

    def advance(self, attention: nn.Module | None = None) -> None:
        """Carry both streams through the layer, the converted one with `attention` where it is given."""
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
    """Measurements at one layer, on the states that the converted prefix produces.

    Attributes:
        key_weight: Weight of key errors against value errors in a joint factorization. 1 counts a logit's error by its
            first-order effect on the output if all tokens' value errors were independent; they are not, so less is
            better. Found by the caller by trying.
        dtype: Of the states, and of what is measured on them.
        memo: For what a method computes once and uses for every candidate.
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
        """The factorization of `rows` under the layer's inputs; the last one is kept, for another rank of the same.

        Args:
            key: Tells the rows apart; `key_weight` is added to it.
            rows: Makes them.
            centered: The inputs' mean goes through biases behind the latent; else the latent holds it too.
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
        """[N, L], see the module."""
        return self._walk.middle.square().mean(-1).clamp_min(torch.finfo(torch.float32).tiny).reciprocal()

    @property
    def logit_scale(self) -> float:
        """What a product of query and key is multiplied by: D^-½ and a rotary embedding's attention factor, twice."""
        return self._geometry.head_dim**-0.5 * self._source.attention_scaling**2

    def _heads(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Normed states [B, L, d], queries [B, H, L, D] and keys [B, G, L, D] behind their norms, values alike."""
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
        """Rotated queries and keys, and the attention weights [B, H, L, L]."""
        half = self._geometry.head_dim // 2
        cos, sin = (table[..., :half].unsqueeze(1) for table in self._walk.position_embeddings)
        rotation = Rotation(cos, sin)
        query, key = rotate(query, rotation), rotate(key, rotation)
        share = query.shape[1] // key.shape[1]
        # cos and sin carry the rotary embedding's attention factor already.
        logits = query @ key.repeat_interleave(share, dim=1).mT * self._geometry.head_dim**-0.5
        return query, key, logits.masked_fill(~self._walk.mask, float("-inf")).softmax(dim=-1)

    @cached_property
    def _output_moments(self) -> Tensor:
        """W_O,hᵀ W_O,h of every query head, [H, D, D], in the states' dtype."""
        return output_moments(self._source).to(self._walk.dtype)

    def _value_spread(self, weights: Tensor, value: Tensor) -> Tensor:
        """Variance, under each query's attention, of what the values add to the hidden state: [B, H, L]."""
        value = value.repeat_interleave(weights.shape[1] // value.shape[1], dim=1)  # [B, H, L, D]
        size = ((value @ self._output_moments) * value).sum(-1, keepdim=True)
        mean = weights @ value
        mean_size = ((mean @ self._output_moments) * mean).sum(-1)
        return ((weights @ size)[..., 0] - mean_size).clamp_min(0)

    @cached_property
    def moments(self) -> LayerMoments:
        """Gathered in one pass over all windows."""
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
        """What the key norm multiplies each key by, [B, G, L]."""
        spec, attention = self._source.spec, self._walk.block.attention
        key = attention.get_submodule(spec.key)(x).unflatten(-1, (-1, self._geometry.head_dim)).transpose(1, 2)
        if spec.key_norm is None:
            return torch.ones_like(key[..., 0])
        norm = attention.get_submodule(spec.key_norm)
        return torch.rsqrt(key.square().mean(-1) + norm.variance_epsilon)  # type: ignore[operator]

    def contribution(self) -> Tensor:
        """Mean over the tokens of ‖q pair‖·‖k pair‖, averaged over the query heads of a group: [G, D/2].

        MHA2MLA (arXiv 2502.14837), section 3.1 (2-norm contribution), on the source's own states. Norms of pairs do not
        change under rotation.
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
        """What it costs that a component stops rotating, [C]: the weighted squared change of the logits.

        Per query row up to a constant shift, which softmax ignores: the variance under the row's attention. In the
        units of `moments.queries`, logit scale included; summed over heads, averaged over query tokens.
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
            # Mixed components of the keys before their norm's factor, which belongs to each head: [C, L].
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
        """Error that `attention` leaves in the hidden state on the held-back windows: root mean square over tokens of
        its size relative to the state's."""
        walk = self._walk
        target = (walk.middle - walk.converted)[self._deciding]
        output = torch.cat(list(walk.outputs(attention, walk.converted[self._deciding])))
        squares = (output - target).double().square().mean(-1) * self._row_weights[self._deciding]
        error = float(squares.mean().sqrt())
        return error if math.isfinite(error) else math.inf

    def heal(self, attention: nn.Module) -> Healing:
        """Refit `attention.o_proj` by ridge regression, so that the block gives the source's states.

        Target: the source's hidden state behind the attention minus the converted stream before it. The ridge is
        chosen on the held-back windows; the fit then takes all of them.
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
    """W_O,hᵀ W_O,h of every query head, [H, D, D]: what an error of a value adds to the hidden state, squared."""
    heads = source.output()["o_proj.weight"].double().unflatten(1, (source.geometry.num_attention_heads, -1))
    return torch.einsum("ohd,ohe->hde", heads, heads)


def _working_copy(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in evaluation mode whose attention is causal by itself and takes a dense mask."""
    clone = copy.deepcopy(module).to(dtype).eval()
    config = getattr(clone, "config", None)
    if config is not None:
        config = copy.copy(config)
        config._attn_implementation = "sdpa"  # type: ignore[union-attr]
        clone.config = config
    return clone
