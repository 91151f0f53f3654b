"""Multi-head Latent Attention behind the Transformers attention and cache contracts.

The letters are those of `optimum_mla.core.geometry`; B, S, T are batch, query tokens and cached tokens. Parameter names
and the order of dims in a head (position-free first) are DeepSeek's (`DeepseekV3Attention` in Transformers).

A layer caches two single-head 4-D tensors through the ordinary `Cache.update`, so every Transformers cache class works;
expanded keys and values live only for the length of one forward pass. A cache that has `update_blocks`
(`optimum_mla.cache.LatentCache`) hands its tokens over in blocks, which need not be dense.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from optimum_mla.core.geometry import MLAGeometry
from optimum_mla.nn.norm import NORM_EPS
from optimum_mla.nn.projections import Roles
from optimum_mla.ops.absorb import grouped_context, grouped_logits
from optimum_mla.ops.blocks import Block, CacheView, TensorView
from optimum_mla.ops.blockwise import Sums, attend, capped, masked_softmax, scaled_queries, softmax_sums
from optimum_mla.ops.positions import cached_positions, check_positions
from optimum_mla.ops.rotary import AbsoluteFrames, PairTable, RelativeFrames, RotaryFrames, Rotation
from optimum_mla.stack import (
    by_layer_type,
    changes_attention,
    check_cache,
    check_keywords,
    first_positions_table,
    forward_keywords,
    rotary_table,
    takes_cache,
)


@dataclass(frozen=True)
class NewTokens:
    """The new tokens of a pass: their number, positions, rotations and mask.

    Attributes:
        rotation: Their frequencies.
        length: Their number, S.
        seen: Number of tokens that were in the cache before them.
        stored: The positions that the cache holds, or None where it holds none.
        mask: The mask as the attention implementation makes it.
        position_ids: Their positions, [1 or B, S], or None.
    """

    rotation: Rotation
    length: int
    seen: int | Tensor
    stored: Any
    mask: Any
    position_ids: Tensor | None


class LatentAttention(nn.Module, ABC):
    """The base of every latent attention: the cache, the choice of path, positions, the output projection.

    A subclass says what is cached (`_latents`) and computes attention over it by expanding the cache to keys and values
    (`_expand`) or in latent space (`_absorbed`). Both give the same result; which runs is decided at each call by
    counting multiply-adds (`_absorbing_saves`).

    Args:
        config: The model's config (attention implementation, dropout, `rms_norm_eps`).
        geometry: Shape of the layer.
        layer_idx: Index of the layer in the cache.
        rotary: The model's rotary embedding; its cos/sin table serves cached positions too. Not a submodule.
        pairs: How this table is read in this layer; None takes half-split dims that all rotate.
        layer_type: The type of the layer, such as `full_attention`, or None.
        sliding_window: Window of this layer in tokens, or None.
    """

    is_causal = True
    known_keywords = forward_keywords() | {"use_cache"}
    """Keywords that `forward` may be given beside its own arguments."""
    roles: ClassVar[Roles]
    """Which of the layer's modules do what."""
    rotary: nn.Module

    def __init__(
        self,
        config: Any,
        geometry: MLAGeometry,
        layer_idx: int,
        rotary: nn.Module,
        pairs: PairTable | None = None,
        layer_type: str | None = None,
        sliding_window: int | None = None,
    ) -> None:
        super().__init__()
        g = geometry
        self.config, self.geometry, self.layer_idx = config, geometry, layer_idx
        self.pairs, self.rotary_keywords = pairs or PairTable(g.head_dim), by_layer_type(rotary, layer_type)
        self.sliding_window = sliding_window
        self.scaling = g.head_dim**-0.5
        self.attention_dropout = getattr(config, "attention_dropout", 0.0) or 0.0
        self.num_key_value_groups = g.num_attention_heads // g.num_up_heads
        # Shared by all layers and owned by the model: registering it here would save and move it once a layer.
        object.__setattr__(self, "rotary", rotary)
        self._build(g, getattr(config, "rms_norm_eps", NORM_EPS))
        self.o_proj = nn.Linear(g.num_attention_heads * g.v_head_dim, g.hidden_size, bias=g.output_bias)

    @abstractmethod
    def _build(self, g: MLAGeometry, eps: float) -> None:
        """Create the projections."""

    @abstractmethod
    def _queries(self, hidden_states: Tensor) -> Tensor:
        """Return the queries [B, H, S, n + R], normed, not yet rotated."""

    @abstractmethod
    def _latents(self, hidden_states: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Return the two tensors to cache for the new tokens, [B, 1, S, ·]."""

    @abstractmethod
    def _rotate_queries(self, queries: Tensor, rotation: Rotation) -> Tensor:
        """Return the queries with their rotary dims rotated."""

    @abstractmethod
    def _rotation(self, turns: tuple[Tensor, Tensor]) -> Rotation:
        """Return the frequencies of this layer's rotary heads, from cos and sin of all pairs, [B, S, D/2] each."""

    @abstractmethod
    def needs_cached_positions(self) -> bool:
        """Return whether keys are rotated after they are read from the cache."""

    @abstractmethod
    def _expand(self, block: Block, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        """Return keys [B, U, T, n + R], rotated, and values [B, U, T, v] of some cached tokens."""

    @abstractmethod
    def _absorbed(
        self, queries: Tensor, view: CacheView, frames: RotaryFrames | None, mask: Tensor | None, keep_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return context [B, H, S, v] and, if asked for, attention weights [B, H, S, T], computed in latent space.

        Queries are rotated already where `frames` is None, that is, where no key is rotated after it is read from the
        cache.
        """

    @abstractmethod
    def _absorbable(self) -> bool:
        """Return whether `_absorbed` may read the up-projection's weight.

        It may not where an adapter, a quantizer or an offload hook acts only when the module is called.
        """

    @abstractmethod
    def _absorbing_saves(self, queries: int, tokens: int) -> bool:
        """Return whether `_absorbed` takes fewer multiply-adds than `_expand` and ordinary attention."""

    @takes_cache
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Any = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute latent attention; arguments and results are those of the attention that this module replaces.

        Args:
            hidden_states: [B, S, d].
            position_embeddings: cos and sin of the new tokens, [B, S, W] each for W rotary dims of the source's heads.
            attention_mask: A mask as the attention implementation makes it (None, boolean, additive, 2-D, block mask).
            cache: A Transformers cache or None. `past_key_values` is another name for it.
            position_ids: The new tokens' positions, [1 or B, S].
            **kwargs: Keywords that Transformers' attention functions take.

        Returns:
            The attention output [B, S, d] and, under `eager`, the attention weights [B, H, S, T].

        Raises:
            UnknownKeywordError: A keyword that nothing here would use.
        """
        check_keywords(kwargs, self.known_keywords, type(self).__name__, self.config._attn_implementation)
        rotation = self._rotation(self.pairs.cos_sin(position_embeddings))
        queries, new = self._queries(hidden_states), self._latents(hidden_states, rotation)
        context, weights = self.attend(queries, new, rotation, attention_mask, cache, position_ids, **kwargs)
        return self.o_proj(context.flatten(2)), weights

    def attend(
        self,
        queries: Tensor,
        new: tuple[Tensor, Tensor],
        rotation: Rotation,
        attention_mask: Any = None,
        cache: Any = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute what lies between the projections: the update of the cache, the logits and the weighted sum.

        Args:
            queries: [B, H, S, n + R], not yet rotated.
            new: The two tensors to cache for the new tokens, [B, 1, S, ·].
            rotation: The new tokens' frequencies.
            attention_mask, cache, position_ids: The arguments of `forward`.
            **kwargs: Keywords for the attention function.

        Returns:
            Context [B, S, H, v] and, under `eager`, the attention weights [B, H, S, T].
        """
        length = queries.shape[2]
        # Static caches count in a tensor that update() changes in place: take a copy.
        seen = 0 if cache is None else cache.get_seq_length(self.layer_idx) + 0
        stored = getattr(cache, "positions", None)
        view = self._update(cache, new, length, position_ids)
        tokens = NewTokens(rotation, length, seen, stored, attention_mask, position_ids)
        frames = None
        if self.needs_cached_positions():
            frames = self._frames(view, tokens)
        else:
            queries = self._rotate_queries(queries, rotation)

        # Our own softmax takes a dense mask, or none where nothing is masked: one token that sees all the others.
        if attention_mask is None:
            dense = length == 1
        else:
            dense = isinstance(attention_mask, Tensor) and attention_mask.ndim == 4
        if changes_attention(kwargs):
            dense = False  # only the attention function knows what to do with them
        absorbing = self._absorbable() and self._absorbing_saves(length, view.tokens)
        if dense and (absorbing or not view.is_dense):
            blockwise = self._absorbed if absorbing else self._expanded
            eager = self.config._attn_implementation == "eager"
            context, weights = blockwise(queries, view, frames, attention_mask, keep_weights=eager)
            return context.transpose(1, 2), None if weights is None else weights.to(queries.dtype)
        key_rotation = None
        if frames is not None:
            frames = self._frames(view, tokens, relative=False)
            everything = slice(0, view.tokens)
            queries, key_rotation = self._rotate_queries(queries, frames.query(everything)), frames.key(everything)
        keys, values = self._expand(view.whole(), key_rotation)
        return self._by_attention_function(queries, keys, values, tokens, **kwargs)

    def _update(self, cache: Any, new: tuple[Tensor, Tensor], length: int, position_ids: Tensor | None) -> CacheView:
        """Append the new tokens to the cache, if there is one, and return a view of all tokens."""
        first, second = new
        if cache is not None:
            check_cache(cache, self.layer_idx, first, second)
        if getattr(cache, "positions", None) is not None:
            cache.note_positions(self.layer_idx, length, position_ids)
        if self.sliding_window is None and hasattr(cache, "update_blocks"):
            view: CacheView = cache.update_blocks(first, second, self.layer_idx)
            return view
        if cache is not None:
            first, second = cache.update(first, second, self.layer_idx)
        return TensorView(first, second, self.geometry.cached_key_factors)

    def _by_attention_function(
        self, queries: Tensor, keys: Tensor, values: Tensor, tokens: NewTokens, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return what the attention function of Transformers that the config names makes of expanded keys and values.

        Args:
            queries: Rotated, [B, H, S, n + R].
            keys: Rotated, [B, U, T, n + R].
            values: [B, U, T, v].
            tokens: What the pass tells about its tokens.
            **kwargs: Keywords for the attention function.
        """
        # PyTorch's fast kernels take the numbers of a token side by side only, and keys are made dim by dim.
        keys, value_dim = keys if keys.stride(-1) == 1 else keys.contiguous(), values.shape[-1]
        if value_dim < keys.shape[-1] and self.config._attn_implementation != "eager":
            # The fast kernels want keys and values alike: zeros cost less than the slow kernel.
            values = nn.functional.pad(values, (0, keys.shape[-1] - value_dim))
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        context, weights = attention(
            self,
            queries,
            keys,
            values,
            tokens.mask,
            dropout=self._dropout,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            position_ids=tokens.position_ids,
            **({} if self.geometry.logit_cap is None else {"softcap": self.geometry.logit_cap}),
            **kwargs,
        )
        return context[..., :value_dim], weights

    def _frames(self, view: CacheView, tokens: NewTokens, relative: bool = True) -> RotaryFrames:
        """Return the rotations of the cached keys, by the block where positions are consecutive and it is allowed."""
        rotation, length, stored = tokens.rotation, tokens.length, tokens.stored

        def table(positions: Tensor) -> Rotation:
            tables = rotary_table(self.rotary, rotation.cos, positions, self.rotary_keywords)
            return self._rotation(self.pairs.cos_sin(tables))

        device = rotation.cos.device
        if stored is not None and stored.consecutive and length == 1 and relative:
            longest = max(view.sizes)
            tables = first_positions_table(self.rotary, rotation.cos, longest, self.rotary_keywords)
            turns = self.pairs.cos_sin((tables[0][:, :longest], tables[1][:, :longest]))
            distances = torch.tensor([[view.tokens - 1]], device=device)
            return RelativeFrames(table, self._rotation(turns), distances, view.sizes)
        if view.tokens == length:
            return AbsoluteFrames(rotation.at, rotation)
        if stored is not None:
            positions = stored.last(view.tokens, device)
        else:
            windowed, ids, mask, seen = self.sliding_window is not None, tokens.position_ids, tokens.mask, tokens.seen
            positions = cached_positions(ids, mask, seen, length, view.tokens, device, windowed=windowed)
            check_positions(positions, ids, mask, seen, length, windowed=windowed)
        return AbsoluteFrames(lambda span: table(positions[:, span]), rotation)

    def _expanded(
        self, queries: Tensor, view: CacheView, frames: RotaryFrames | None, mask: Tensor | None, keep_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Compute what `_absorbed` computes, with the cache expanded one block at a time."""
        scaled = scaled_queries(queries, self.scaling)

        def partial(block: Block, span: slice, mask: Tensor | None) -> Sums:
            keys, values = self._expand(block, None if frames is None else frames.key(span))
            rotated = scaled if frames is None else self._rotate_queries(scaled, frames.query(span))
            logits = capped(grouped_logits(rotated, keys), self.geometry.logit_cap)
            return softmax_sums(logits, lambda weights: grouped_context(weights, values), mask, self._dropout)

        attended = attend(view, partial, mask, keep_weights)
        return attended.context.to(queries.dtype), attended.weights

    @property
    def _dropout(self) -> float:
        return self.attention_dropout if self.training else 0.0


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Compute plain attention, with the signature of Transformers' attention functions.

    Args:
        query: [B, H, S, n + R]. key: [B, U, T, n + R]. value: [B, U, T, v]. Heads are grouped, never repeated.

    Returns:
        Context [B, S, H, v] and weights [B, H, S, T].
    """
    logits = capped(grouped_logits(query, key) * scaling, softcap)
    weights = masked_softmax(logits, attention_mask, dropout)
    return grouped_context(weights, value).transpose(1, 2).to(query.dtype), weights.to(query.dtype)
