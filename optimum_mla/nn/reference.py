"""Latent attention written as its equations say, in float64, without a cache, blocks or absorbed weights.

This is what every attention module of this package must agree with. A conversion computes each layer once by it, from
the factorization's own tensors, and compares the module that it is about to save.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optimum_mla.core.geometry import MLAGeometry


def reference_attention(
    geometry: MLAGeometry,
    tensors: dict[str, Tensor],
    states: Tensor,
    turns: tuple[Tensor, Tensor],
    eps: float,
    latent_eps: float,
    window: int | None = None,
) -> Tensor:
    """Return the attention's output [B, S, d] on normed states, in float64, causal.

    Args:
        geometry: The layer's shape.
        tensors: The layer's parameters and buffers by their names in the attention module.
        states: The attention's input, [B, S, d].
        turns: cos and sin of all pairs of a source head, [1 or B, S, D/2] each.
        eps: What the norms of query and key heads add to the mean square.
        latent_eps: What the norms of latents add to it.
        window: Tokens that a token sees at most, or None.
    """
    g = geometry
    weights = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
    x = states.double()
    cos, sin = (part.double() for part in turns)

    def linear(name: str, value: Tensor) -> Tensor:
        bias = weights.get(f"{name}.bias")
        mapped = value @ weights[f"{name}.weight"].T
        return mapped if bias is None else mapped + bias

    def heads(value: Tensor, count: int) -> Tensor:
        return value.unflatten(-1, (count, -1)).transpose(1, 2)  # [B, count, S, ·]

    def normed(value: Tensor, name: str, dims: int, epsilon: float) -> Tensor:
        over = (1, 3) if g.joint_norms and value.ndim == 4 else -1  # Latents have no heads.
        rms = value[..., :dims].square().mean(over, keepdim=True).add(epsilon).rsqrt()
        gain = weights[f"{name}.weight"]
        if gain.ndim == 2:  # one gain vector for each of some heads
            gain = gain.repeat_interleave(value.shape[1] // gain.shape[0], dim=0).unsqueeze(1)
        return value * rms * gain

    def rotated(value: Tensor, pairs: Tensor) -> Tensor:
        """Rotate heads [B, X, S, R] by the frequencies `pairs` [K, R/2] of the table, X/K heads by a row."""
        rows = pairs.repeat_interleave(value.shape[1] // pairs.shape[0], dim=0)  # [X, R/2]
        c, s = (part[..., rows].transpose(1, 2) for part in (cos, sin))  # [B, X, S, R/2]
        first, second = value.chunk(2, dim=-1)
        return torch.cat([first * c - second * s, second * c + first * s], dim=-1)

    if g.attention_form == "full":
        pairs = torch.arange(g.head_dim // 2, device=x.device)[None]
        query = heads(linear("q_proj", x), g.num_attention_heads)
        if g.kv_lora_rank:
            key_latent = value_latent = linear("kv_a_proj", x)
        else:
            key_latent, value_latent = linear("k_a_proj", x), linear("v_a_proj", x)
        key, value = heads(linear("k_b_proj", key_latent), g.num_up_heads), linear("v_b_proj", value_latent)
        if g.key_norm:
            query, key = normed(query, "q_norm", g.head_dim, eps), normed(key, "k_norm", g.head_dim, eps)
        query, key, value = rotated(query, pairs), rotated(key, pairs), heads(value, g.num_up_heads)
    else:
        n, r, pairs = g.qk_nope_head_dim, g.kv_lora_rank, weights["rope_pairs"].to(x.device)
        if g.q_lora_rank is None:
            query = heads(linear("q_proj", x), g.num_attention_heads)
        else:
            inner = linear("q_a_proj", x)
            inner = normed(inner, "q_a_layernorm", g.q_lora_rank, latent_eps) if g.latent_norm else inner
            query = heads(linear("q_b_proj", inner), g.num_attention_heads)
        if g.key_norm:
            query = normed(query, "q_norm", g.head_dim, eps)
        compressed = linear("kv_a_proj_with_mqa", x)
        latent = compressed[..., :r]
        latent = normed(latent, "kv_a_layernorm", r, latent_eps) if g.latent_norm else latent
        rope = compressed[..., r:] if g.rope_cache == "cached" else linear("k_rope_proj", latent)
        nope, value = heads(linear("kv_b_proj", latent), g.num_up_heads).split([n, g.v_head_dim], dim=-1)
        rope = rotated(heads(rope, g.num_rope_heads), pairs)
        key = torch.cat([nope, rope.repeat_interleave(g.num_up_heads // g.num_rope_heads, dim=1)], dim=-1)
        if g.key_norm:
            own = heads(linear("k_scale_proj", x), g.num_key_value_heads)
            factor = own.square().mean((1, 3) if g.joint_norms else 3, keepdim=True).add(eps).rsqrt()
            key = key * factor.repeat_interleave(g.num_up_heads // g.key_factors, dim=1)
        query = torch.cat([query[..., :n], rotated(query[..., n:], pairs)], dim=-1)

    share = g.num_attention_heads // g.num_up_heads
    scores = query @ key.repeat_interleave(share, dim=1).mT * g.head_dim**-0.5
    if g.logit_cap is not None:
        scores = g.logit_cap * torch.tanh(scores / g.logit_cap)
    tokens = torch.arange(x.shape[1], device=x.device)
    distance = tokens[:, None] - tokens
    seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    weights_ = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    context = (weights_ @ value.repeat_interleave(share, dim=1)).transpose(1, 2).flatten(2)
    return linear("o_proj", context)
