"""Multi-head Latent Attention behind the Transformers attention and cache contracts.

The letters are those of `optimum_mla.geometry`; B, S, T are batch, query tokens and cached tokens. Parameter names and
the order of dims in a head (position-free first) are DeepSeek's (`DeepseekV3Attention` in Transformers).

A layer caches two single-head 4-D tensors through the ordinary `past_key_values.update`, so every Transformers cache
class works; expanded keys and values live only for the length of one forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from optimum_mla.geometry import MLAGeometry
from optimum_mla.ops import absorb
from optimum_mla.ops.rotary import Rotation, gather_rotation, rotate


class HeadRMSNorm(nn.Module):
    """RMSNorm over each head's dims, one gain vector per rotary head (heads that split their dims differently)."""

    def __init__(self, heads: int, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, dim))
        self.eps = eps

    def gain(self, heads: int) -> Tensor:
        """Gains laid out for [B, heads, S, dim]: [heads, 1, dim]."""
        return self.weight.repeat_interleave(heads // self.weight.shape[0], dim=0).unsqueeze(1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, H, S, dim], normed and multiplied by its head's gain."""
        return nn.functional.rms_norm(x, x.shape[-1:], eps=self.eps) * self.gain(x.shape[1])

    def inverse_rms(self, sum_of_squares: Tensor) -> Tensor:
        """The factor that norms a head whose dims' squares add up to `sum_of_squares`."""
        return torch.rsqrt(sum_of_squares.float() / self.weight.shape[-1] + self.eps)


class LatentAttention(nn.Module):
    """What every latent attention shares: the cache, the choice of path, positions, the output projection.

    A subclass says what is cached (`_latents`) and computes attention over it by expanding the cache to keys and values
    (`_expand`) or in latent space (`_absorbed`). Both give the same result; which runs is decided at each call by
    counting multiply-adds (`_absorbing_saves`).

    Args:
        config: The model's config (attention implementation, dropout, `rms_norm_eps`).
        geometry: Shape of the layer.
        layer_idx: Index of the layer in the cache.
        rotary: The model's rotary embedding; its cos/sin table serves cached positions too. Not a submodule.
        sliding_window: Window of this layer in tokens, or None.
    """

    is_causal = True
    rotary: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

    def __init__(
        self, config: Any, geometry: MLAGeometry, layer_idx: int, rotary: nn.Module, sliding_window: int | None = None
    ) -> None:
        super().__init__()
        g = geometry
        self.config, self.geometry, self.layer_idx = config, geometry, layer_idx
        self.sliding_window = sliding_window
        self.scaling = g.head_dim**-0.5
        self.attention_dropout = getattr(config, "attention_dropout", 0.0) or 0.0
        self.num_key_value_groups = g.num_attention_heads // g.num_up_heads
        # Shared by all layers and owned by the model: registering it here would save and move it once a layer.
        object.__setattr__(self, "rotary", rotary)
        self._build(g, config.rms_norm_eps)
        self.o_proj = nn.Linear(g.num_attention_heads * g.v_head_dim, g.hidden_size, bias=g.output_bias)

    def _build(self, g: MLAGeometry, eps: float) -> None:
        """Create the projections."""
        raise NotImplementedError

    def _queries(self, hidden_states: Tensor) -> Tensor:
        """Queries [B, H, S, n + R], normed, not yet rotated."""
        raise NotImplementedError

    def _latents(self, hidden_states: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """The two tensors to cache for the new tokens, [B, 1, S, ·]."""
        raise NotImplementedError

    def _rotate_queries(self, queries: Tensor, rotation: Rotation) -> Tensor:
        """Queries with their rotary dims rotated."""
        raise NotImplementedError

    def _rotation(self, position_embeddings: tuple[Tensor, Tensor]) -> Rotation:
        """The frequencies of this layer's rotary heads, from the source's table."""
        raise NotImplementedError

    def _needs_cached_positions(self) -> bool:
        """Whether keys are rotated after they are read from the cache."""
        raise NotImplementedError

    def _expand(self, first: Tensor, second: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        """Keys [B, U, T, n + R], rotated, and values [B, U, T, v] of the whole cache."""
        raise NotImplementedError

    def _absorbed(
        self, queries: Tensor, first: Tensor, second: Tensor, rotation: Rotation | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Context [B, H, S, v] and attention weights [B, H, S, T], computed in latent space."""
        raise NotImplementedError

    def _absorbable(self) -> bool:
        """Whether `_absorbed` may read the up-projection's weight.

        Not past an adapter, a quantizer or an offload hook: those act only when the module is called.
        """
        raise NotImplementedError

    def _absorbing_saves(self, queries: int, tokens: int) -> bool:
        """Whether `_absorbed` takes fewer multiply-adds than `_expand` and ordinary attention."""
        raise NotImplementedError

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The signature and result of the attention that this module replaces.

        Args:
            hidden_states: [B, S, d].
            position_embeddings: cos and sin of the new tokens, [B, S, D] each.
            attention_mask: As the attention implementation makes it (None, boolean, additive, 2-D, block mask).
            past_key_values: A Transformers cache or None.
            position_ids: [1 or B, S], the new tokens' positions.

        Returns:
            The attention output [B, S, d] and, under `eager`, the attention weights [B, H, S, T].
        """
        batch, length = hidden_states.shape[:2]
        rotation = self._rotation(position_embeddings)
        queries = self._rotate_queries(self._queries(hidden_states), rotation)
        first, second = self._latents(hidden_states, rotation)
        seen: int | Tensor = 0
        if past_key_values is not None:
            # Static caches count in a tensor that update() changes in place: take a copy.
            seen = past_key_values.get_seq_length(self.layer_idx) + 0
            first, second = past_key_values.update(first, second, self.layer_idx)
        tokens = first.shape[2]

        key_rotation = None
        if self._needs_cached_positions():
            key_rotation = rotation
            if tokens != length:
                # A window hides slots too, so there the mask does not tell padding.
                mask = attention_mask if self.sliding_window is None else None
                positions = _cached_positions(position_ids, mask, seen, length, tokens, hidden_states.device)
                key_rotation = self._rotation(self.rotary(hidden_states, positions))

        # Latent space takes a dense mask, or none where there is nothing to mask: one token that sees all the others.
        if attention_mask is None:
            dense = length == 1
        else:
            dense = isinstance(attention_mask, Tensor) and attention_mask.ndim == 4
        weights: Tensor | None
        if dense and self._absorbable() and self._absorbing_saves(length, tokens):
            context, weights = self._absorbed(queries, first, second, key_rotation, attention_mask)
            context = context.transpose(1, 2)  # [B, S, H, v]
            weights = weights if self.config._attn_implementation == "eager" else None
        else:
            keys, values = self._expand(first, second, key_rotation)
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
            context, weights = attend(
                self,
                queries,
                keys,
                values,
                attention_mask,
                dropout=self._dropout,
                scaling=self.scaling,
                sliding_window=self.sliding_window,
                position_ids=position_ids,
                **kwargs,
            )
        return self.o_proj(context.reshape(batch, length, -1)), weights

    @property
    def _dropout(self) -> float:
        return self.attention_dropout if self.training else 0.0


def _cached_positions(
    position_ids: Tensor | None,
    attention_mask: Any,
    seen: int | Tensor,
    length: int,
    tokens: int,
    device: torch.device,
) -> Tensor:
    """Positions [1 or B, T] of the cached tokens, counted back from the last new token that is not padding.

    Positions rise by one from slot to slot, or from one attended slot to the next where `generate`'s rule (the running
    sum of the mask) made them: in rows with masked tokens between others, such as right-padded prompts that are then
    decoded. Which of both it was shows in how far the last position lags behind its slot. Masked slots get some
    position, which nobody attends to. The new tokens lie at the cache's end or, in a static cache that is not yet full,
    right behind those already seen.

    Args:
        position_ids: [1 or B, S] of the new tokens; None counts slots.
        attention_mask: As the layer got it.
        seen: Tokens that went through the cache before.
        length: S. tokens: T.
        device: Where the result is needed.
    """
    room = tokens - length
    first_new = seen.clamp(max=room) if isinstance(seen, Tensor) else min(seen, room)
    slots = torch.arange(tokens, device=device)[None]
    if position_ids is None:
        return slots + (seen - first_new)
    attended = _attended_slots(attention_mask, tokens)
    if attended is None:
        return slots - (first_new + length - 1) + position_ids[:, -1:]
    batch = max(attended.shape[0], position_ids.shape[0])
    attended, position_ids = attended.expand(batch, -1), position_ids.expand(batch, -1)
    steps = torch.arange(length, device=device)
    last = (attended[:, first_new + steps] * steps).argmax(dim=-1, keepdim=True)  # [B, 1], among the new tokens
    slot, position = first_new + last, position_ids.gather(1, last)
    running = attended.cumsum(dim=-1)
    at_slot = running.gather(1, slot)
    masked_before = slot + 1 - at_slot
    follows_mask = slot + (seen - first_new) - position == masked_before
    return position + torch.where(follows_mask, running - at_slot, slots - slot)


def _attended_slots(attention_mask: Any, tokens: int) -> Tensor | None:
    """Which cached slots the last new token sees, [1 or B, T] boolean; None where the mask does not say."""
    if not isinstance(attention_mask, Tensor):
        return None
    row = attention_mask[:, 0, -1] if attention_mask.ndim == 4 else attention_mask
    if row.shape[-1] < tokens:
        return None
    row = row[:, :tokens]
    return row > torch.finfo(row.dtype).min / 2 if row.is_floating_point() else row.bool()


class DecoupledLatentAttention(LatentAttention):
    """One joint latent for keys and values and a decoupled rotary key (DeepSeek-V2, arXiv 2405.04434, section 2.1).

        c   = kv_a(x)                                   [B, 1, T, r]     cached
        k_R = rope(k_rope(x))                           [B, 1, T, K·R]   cached (or rebuilt from c)
        logit(h, t) = q_N(h)·W_UK(h) c_t + q_R(h)·k_R(t)        o(h) = W_UV(h) Σ_t p_t c_t

    The K rotary heads lie side by side in the second tensor, because static caches give both tensors as many heads.
    With key norms it also holds one factor per up-projected head, by which the whole logit of that head is multiplied.
    """

    rope_pairs: Tensor

    def _build(self, g: MLAGeometry, eps: float) -> None:
        d, r, query = g.hidden_size, g.kv_lora_rank, g.num_attention_heads * g.qk_head_dim
        rope = g.num_rope_heads * g.qk_rope_head_dim
        if g.q_lora_rank is None:
            self.q_proj = nn.Linear(d, query, bias=g.query_bias)
        else:
            self.q_a_proj = nn.Linear(d, g.q_lora_rank, bias=False)
            self.q_a_layernorm = nn.RMSNorm(g.q_lora_rank, eps=eps) if g.latent_norm else nn.Identity()
            self.q_b_proj = nn.Linear(g.q_lora_rank, query, bias=g.query_bias)
        cached_rope = rope if g.rope_cache == "cached" else 0
        self.kv_a_proj_with_mqa = nn.Linear(d, r + cached_rope, bias=g.key_value_bias)
        self.kv_a_layernorm = nn.RMSNorm(r, eps=eps) if g.latent_norm else nn.Identity()
        self.kv_b_proj = nn.Linear(r, g.num_up_heads * (g.qk_nope_head_dim + g.v_head_dim), bias=g.key_value_bias)
        if g.rope_cache == "rebuilt":
            self.k_rope_proj = nn.Linear(r, rope, bias=g.key_value_bias)
        if g.key_norm:
            self.q_norm = HeadRMSNorm(g.num_rope_heads, g.qk_head_dim, eps)
            self.k_norm = HeadRMSNorm(g.num_rope_heads, g.qk_head_dim, eps)
        # Which of the source's rotary pairs each rotary head turns with; saved with the weights.
        self.register_buffer("rope_pairs", default_rope_pairs(g))

    def _queries(self, hidden_states: Tensor) -> Tensor:
        g = self.geometry
        if g.q_lora_rank is None:
            queries = self.q_proj(hidden_states)
        else:
            queries = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        queries = queries.view(*hidden_states.shape[:2], -1, g.qk_head_dim).transpose(1, 2)  # [B, H, S, n + R]
        return self.q_norm(queries) if g.key_norm else queries

    def _rotation(self, position_embeddings: tuple[Tensor, Tensor]) -> Rotation:
        return gather_rotation(*position_embeddings, self.rope_pairs)

    def _rotate_queries(self, queries: Tensor, rotation: Rotation) -> Tensor:
        nope, rope = queries.split([self.geometry.qk_nope_head_dim, self.geometry.qk_rope_head_dim], dim=-1)
        return torch.cat([nope, rotate(rope, rotation)], dim=-1)

    def _needs_cached_positions(self) -> bool:
        return self.geometry.rope_cache == "rebuilt"

    def _latents(self, hidden_states: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        g = self.geometry
        compressed = self.kv_a_proj_with_mqa(hidden_states)
        latent = self.kv_a_layernorm(compressed[..., : g.kv_lora_rank]).unsqueeze(1)  # [B, 1, S, r]
        second = []
        if g.rope_cache == "cached":
            rope = self._rope_heads(compressed[..., g.kv_lora_rank :])
            second.append(self._turn(rope, rotation).transpose(1, 2).flatten(2))  # [B, S, K·R]
        elif g.key_norm:
            rope = self._rope_heads(self.k_rope_proj(latent[:, 0]))
        if g.key_norm:
            second.append(self._key_scales(latent, rope))
        if not second:
            return latent, latent[..., :0]
        return latent, torch.cat(second, dim=-1).unsqueeze(1)

    def _rope_heads(self, flat: Tensor) -> Tensor:
        """[B, T, K·R] as [B, K, T, R]."""
        return flat.unflatten(-1, (self.geometry.num_rope_heads, self.geometry.qk_rope_head_dim)).transpose(1, 2)

    def _turn(self, rope: Tensor, rotation: Rotation) -> Tensor:
        """The rotary key [B, K, T, R] with its norm's gain, rotated."""
        if self.geometry.key_norm:
            rope = rope * self.k_norm.gain(rope.shape[1])[..., self.geometry.qk_nope_head_dim :]
        return rotate(rope, rotation)

    def _key_scales(self, latent: Tensor, rope: Tensor) -> Tensor:
        """Inverse root mean square [B, S, U] of each up-projected key [W_UK c ; k_R]."""
        nope, _ = self._up_project(latent)
        squares = nope.float().square().sum(-1)  # [B, U, S]
        squares = squares + rope.float().square().sum(-1).repeat_interleave(squares.shape[1] // rope.shape[1], dim=1)
        return self.k_norm.inverse_rms(squares).to(latent.dtype).transpose(1, 2)

    def _up_project(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Position-free keys [B, U, T, n] and values [B, U, T, v] of latents [B, 1, T, r]."""
        g = self.geometry
        heads = self.kv_b_proj(latent[:, 0]).unflatten(-1, (g.num_up_heads, -1)).transpose(1, 2)
        nope, value = heads.split([g.qk_nope_head_dim, g.v_head_dim], dim=-1)
        return nope, value

    def _rotary_key(self, latent: Tensor, second: Tensor, rotation: Rotation | None) -> Tensor:
        """Rotated rotary key [B, K, T, R] of the whole cache."""
        if rotation is not None:
            return self._turn(self._rope_heads(self.k_rope_proj(latent[:, 0])), rotation)
        width = self.geometry.num_rope_heads * self.geometry.qk_rope_head_dim
        return self._rope_heads(second[:, 0, :, :width])

    def _cached_scales(self, second: Tensor) -> Tensor:
        """The key norms' factors [B, U, T]."""
        return second[:, 0, :, -self.geometry.num_up_heads :].transpose(1, 2)

    def _expand(self, first: Tensor, second: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        g = self.geometry
        nope, values = self._up_project(first)
        rope = self._rotary_key(first, second, rotation)
        rope = rope.repeat_interleave(g.num_up_heads // g.num_rope_heads, dim=1)
        if g.key_norm:
            nope = nope * self.k_norm.gain(g.num_up_heads)[..., : g.qk_nope_head_dim]
        keys = torch.cat([nope, rope], dim=-1)
        return (keys * self._cached_scales(second).unsqueeze(-1) if g.key_norm else keys), values

    def _absorbed(
        self, queries: Tensor, first: Tensor, second: Tensor, rotation: Rotation | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        g = self.geometry
        up = self.kv_b_proj.weight.view(g.num_up_heads, -1, g.kv_lora_rank)  # [U, n + v, r]
        key_up, value_up = up.split([g.qk_nope_head_dim, g.v_head_dim], dim=1)
        nope, rope = queries.split([g.qk_nope_head_dim, g.qk_rope_head_dim], dim=-1)
        if g.key_norm:
            nope = nope * self.k_norm.gain(g.num_attention_heads)[..., : g.qk_nope_head_dim]

        logits = absorb.shared_logits(absorb.through_up_projection(nope, key_up), first)
        if g.qk_rope_head_dim:
            logits = logits + absorb.grouped_logits(rope, self._rotary_key(first, second, rotation))
        value_bias = None
        if self.kv_b_proj.bias is not None:
            bias = self.kv_b_proj.bias.view(g.num_up_heads, -1)  # [U, n + v]
            key_bias, value_bias = bias.split([g.qk_nope_head_dim, g.v_head_dim], dim=1)
            logits = logits + absorb.through_up_projection(nope, key_bias.unsqueeze(-1))
        if g.key_norm:
            logits = logits * self._cached_scales(second).repeat_interleave(self.num_key_value_groups, 1).unsqueeze(2)
        weights = absorb.attention_weights(logits * self.scaling, mask, self._dropout)
        return absorb.absorbed_values(weights, first, value_up, value_bias), weights

    def _absorbable(self) -> bool:
        return _is_plain(self.kv_b_proj)

    def _absorbing_saves(self, queries: int, tokens: int) -> bool:
        g = self.geometry
        return absorb.absorbing_saves(
            queries, tokens, g.kv_lora_rank, g.num_attention_heads, g.num_up_heads, g.qk_nope_head_dim, g.v_head_dim
        )


class FullRopeLatentAttention(LatentAttention):
    """Keys and values from two latents, RoPE on every up-projected key dim (TransMLA, arXiv 2502.07864v1, section 4).

        c_K = k_a(x)  [B, 1, T, r_k]     c_V = v_a(x)  [B, 1, T, r_v]        both cached, neither carries position
        logit(h, t) = rope(q(h))·rope(W_UK(h) c_K,t)              o(h) = W_UV(h) Σ_t p_t c_V,t

    The rotation stands between the up-projection and the query, so keys are always expanded; values can be absorbed.
    """

    def _build(self, g: MLAGeometry, eps: float) -> None:
        self.q_proj = nn.Linear(g.hidden_size, g.num_attention_heads * g.head_dim, bias=g.query_bias)
        self.k_a_proj = nn.Linear(g.hidden_size, g.k_lora_rank, bias=False)
        self.k_b_proj = nn.Linear(g.k_lora_rank, g.num_up_heads * g.head_dim, bias=g.key_value_bias)
        self.v_a_proj = nn.Linear(g.hidden_size, g.v_lora_rank, bias=False)
        self.v_b_proj = nn.Linear(g.v_lora_rank, g.num_up_heads * g.head_dim, bias=g.key_value_bias)
        if g.key_norm:
            self.q_norm = HeadRMSNorm(1, g.head_dim, eps)
            self.k_norm = HeadRMSNorm(1, g.head_dim, eps)

    def _heads(self, flat: Tensor) -> Tensor:
        """[B, T, heads·D] as [B, heads, T, D]."""
        return flat.unflatten(-1, (-1, self.geometry.head_dim)).transpose(1, 2)

    def _queries(self, hidden_states: Tensor) -> Tensor:
        queries = self._heads(self.q_proj(hidden_states))
        return self.q_norm(queries) if self.geometry.key_norm else queries

    def _rotation(self, position_embeddings: tuple[Tensor, Tensor]) -> Rotation:
        half = self.geometry.head_dim // 2
        cos, sin = position_embeddings
        return Rotation(cos[..., :half].unsqueeze(1), sin[..., :half].unsqueeze(1))

    def _rotate_queries(self, queries: Tensor, rotation: Rotation) -> Tensor:
        return rotate(queries, rotation)

    def _needs_cached_positions(self) -> bool:
        return True

    def _latents(self, hidden_states: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        return self.k_a_proj(hidden_states).unsqueeze(1), self.v_a_proj(hidden_states).unsqueeze(1)

    def _keys(self, latent: Tensor, rotation: Rotation | None) -> Tensor:
        keys = self._heads(self.k_b_proj(latent[:, 0]))
        keys = self.k_norm(keys) if self.geometry.key_norm else keys
        return rotate(keys, rotation) if rotation is not None else keys

    def _expand(self, first: Tensor, second: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        return self._keys(first, rotation), self._heads(self.v_b_proj(second[:, 0]))

    def _absorbed(
        self, queries: Tensor, first: Tensor, second: Tensor, rotation: Rotation | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        g = self.geometry
        logits = absorb.grouped_logits(queries, self._keys(first, rotation))
        weights = absorb.attention_weights(logits * self.scaling, mask, self._dropout)
        value_up = self.v_b_proj.weight.view(g.num_up_heads, g.head_dim, g.v_lora_rank)
        bias = self.v_b_proj.bias
        value_bias = None if bias is None else bias.view(g.num_up_heads, g.head_dim)
        return absorb.absorbed_values(weights, second, value_up, value_bias), weights

    def _absorbable(self) -> bool:
        return _is_plain(self.v_b_proj)

    def _absorbing_saves(self, queries: int, tokens: int) -> bool:
        g = self.geometry
        return absorb.absorbing_saves(
            queries, tokens, g.v_lora_rank, g.num_attention_heads, g.num_up_heads, 0, g.v_head_dim
        )


def _is_plain(linear: nn.Module) -> bool:
    return type(linear) is nn.Linear and linear.weight.is_floating_point() and not hasattr(linear, "_hf_hook")


def default_rope_pairs(geometry: MLAGeometry) -> Tensor:
    """The R/2 fastest pairs for every rotary head, [K, R/2]: what a model with random weights starts from."""
    return torch.arange(geometry.qk_rope_head_dim // 2).repeat(geometry.num_rope_heads, 1)
