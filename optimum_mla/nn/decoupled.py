"""The decoupled form: one joint latent and a rotary key beside it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from optimum_mla.core.geometry import MLAGeometry
from optimum_mla.nn.attention import LatentAttention
from optimum_mla.nn.norm import HeadRMSNorm, inverse_rms
from optimum_mla.nn.plain import is_plain
from optimum_mla.nn.projections import DECOUPLED
from optimum_mla.ops import absorb
from optimum_mla.ops.blocks import Block, CacheView
from optimum_mla.ops.blockwise import LatentDecode, RotaryRebuild
from optimum_mla.ops.kernels import kernel_for
from optimum_mla.ops.rotary import RotaryFrames, Rotation, gather_rotation, rotate

LATENT_NORM_EPS = 1e-6
"""The epsilon of the norms on latents. It is DeepSeek's, whatever epsilon the model's other norms have."""


class DecoupledLatentAttention(LatentAttention):
    """One joint latent for keys and values and a decoupled rotary key (DeepSeek-V2, arXiv 2405.04434, section 2.1).

        c   = kv_a(x)                                   [B, 1, T, r]     cached
        k_R = rope(k_rope(x))                           [B, 1, T, K·R]   cached (or rebuilt from c)
        logit(h, t) = q_N(h)·W_UK(h) c_t + q_R(h)·k_R(t)        o(h) = W_UV(h) Σ_t p_t c_t

    The K rotary heads lie side by side in the second tensor, because static caches give both tensors as many heads.
    With key norms it also holds one factor per key head, by which the whole logit of that head is multiplied. It comes
    from the source's own key projection, so it is exact at any rank.
    """

    roles = DECOUPLED
    rope_pairs: Tensor

    def _build(self, g: MLAGeometry, eps: float) -> None:
        d, r, query = g.hidden_size, g.kv_lora_rank, g.num_attention_heads * g.qk_head_dim
        rope = g.num_rope_heads * g.qk_rope_head_dim
        if g.q_lora_rank is None:
            self.q_proj = nn.Linear(d, query, bias=g.query_bias)
        else:
            self.q_a_proj = nn.Linear(d, g.q_lora_rank, bias=False)
            self.q_a_layernorm = nn.RMSNorm(g.q_lora_rank, eps=LATENT_NORM_EPS) if g.latent_norm else nn.Identity()
            self.q_b_proj = nn.Linear(g.q_lora_rank, query, bias=g.query_bias)
        cached_rope = rope if g.rope_cache == "cached" else 0
        self.kv_a_proj_with_mqa = nn.Linear(d, r + cached_rope, bias=g.down_bias)
        self.kv_a_layernorm = nn.RMSNorm(r, eps=LATENT_NORM_EPS) if g.latent_norm else nn.Identity()
        self.kv_b_proj = nn.Linear(r, g.num_up_heads * (g.qk_nope_head_dim + g.v_head_dim), bias=g.up_bias)
        if g.rope_cache == "rebuilt":
            self.k_rope_proj = nn.Linear(r, rope, bias=g.up_bias)
        if g.key_norm:
            self.q_norm = HeadRMSNorm(g.query_gains, g.qk_head_dim, eps, normed_dim=g.head_dim, joint=g.joint_norms)
            self.k_scale_proj = nn.Linear(d, g.num_key_value_heads * g.head_dim, bias=g.key_value_bias)
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

    def _rotation(self, turns: tuple[Tensor, Tensor]) -> Rotation:
        return gather_rotation(*turns, self.rope_pairs)

    def _rotate_queries(self, queries: Tensor, rotation: Rotation) -> Tensor:
        nope, rope = queries.split([self.geometry.qk_nope_head_dim, self.geometry.qk_rope_head_dim], dim=-1)
        return torch.cat([nope, rotate(rope, rotation)], dim=-1)

    def needs_cached_positions(self) -> bool:
        return self.geometry.rope_cache == "rebuilt"

    def _latents(self, hidden_states: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        g = self.geometry
        compressed = self.kv_a_proj_with_mqa(hidden_states)
        latent = self.kv_a_layernorm(compressed[..., : g.kv_lora_rank]).unsqueeze(1)  # [B, 1, S, r]
        second = []
        if g.rope_cache == "cached":
            rope = self._rope_heads(compressed[..., g.kv_lora_rank :])
            second.append(rotate(rope, rotation).transpose(1, 2).flatten(2))  # [B, S, K·R]
        if g.key_norm:
            keys = self.k_scale_proj(hidden_states).unflatten(-1, (-1, g.head_dim))  # [B, S, G, D]
            dims = (2, 3) if g.joint_norms else (3,)
            second.append(inverse_rms(keys, self.q_norm.eps, dims).flatten(2))  # [B, S, G or 1]
        if not second:
            return latent, latent[..., :0]
        return latent, torch.cat(second, dim=-1).unsqueeze(1)

    def _rope_heads(self, flat: Tensor) -> Tensor:
        """Split [B, T, K·R] into heads [B, K, T, R]."""
        return flat.unflatten(-1, (self.geometry.num_rope_heads, self.geometry.qk_rope_head_dim)).transpose(1, 2)

    def _up_project(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Return position-free keys [B, U, T, n] and values [B, U, T, v] of latents [B, T, r]."""
        g, up = self.geometry, self.kv_b_proj
        width = g.qk_nope_head_dim + g.v_head_dim
        if up.bias is None or self._sees_shifts or not is_plain(up):
            flat = up(latent)
        else:
            kept = up.bias.unflatten(0, (-1, width))[:, g.qk_nope_head_dim :]  # that of the values
            flat = nn.functional.linear(latent, up.weight, nn.functional.pad(kept, (g.qk_nope_head_dim, 0)).flatten())
        # Under tensor parallelism the heads of this process only.
        heads = flat.unflatten(-1, (-1, width)).transpose(1, 2)
        nope, value = heads.split([g.qk_nope_head_dim, g.v_head_dim], dim=-1)
        return nope, value

    def _expand(self, block: Block, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        g = self.geometry
        latent = block.first.dense()
        nope, values = self._up_project(latent)
        if rotation is None:
            rope = self._rope_heads(block.second.dense())
        else:
            rope = rotate(self._rope_heads(self.k_rope_proj(latent)), rotation)
        rope = rope.repeat_interleave(nope.shape[1] // g.num_rope_heads, dim=1)
        keys = torch.cat([nope, rope], dim=-1)
        if g.key_norm:
            factors = block.key_factors.to(torch.promote_types(keys.dtype, torch.float32))
            factors = factors.transpose(1, 2).repeat_interleave(nope.shape[1] // g.key_factors, dim=1)
            keys = (keys * factors.unsqueeze(-1)).to(keys.dtype)
        return keys, values

    def _absorbed(
        self, queries: Tensor, view: CacheView, frames: RotaryFrames | None, mask: Tensor | None, keep_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        g = self.geometry
        up = self.kv_b_proj.weight.view(g.num_up_heads, -1, g.kv_lora_rank)  # [U, n + v, r]
        bias = None if self.kv_b_proj.bias is None else self.kv_b_proj.bias.view(g.num_up_heads, -1)  # [U, n + v]
        n = g.qk_nope_head_dim
        nope, rope = queries.split([n, g.qk_rope_head_dim], dim=-1)
        logit_bias = None
        if self._sees_shifts and bias is not None:
            wide = torch.promote_types(rope.dtype, torch.float32)
            logit_bias = absorb.query_bias_logits(nope.to(wide), bias[:, :n].to(wide))
        rebuild = None
        if frames is not None:
            rebuild = RotaryRebuild(self.k_rope_proj.weight, self.k_rope_proj.bias, frames)
        attended = kernel_for(queries.device.type)(
            LatentDecode(
                latent_queries=absorb.folded_queries(nope, up[:, :n]),
                rope_queries=rope,
                logit_bias=logit_bias,
                scaling=self.scaling,
                rope_heads=g.num_rope_heads,
                view=view,
                rebuild=rebuild,
                mask=mask,
                logit_cap=g.logit_cap,
                dropout=self._dropout,
                keep_weights=keep_weights,
            )
        )
        context = absorb.up_projected_context(
            attended.context.to(queries.dtype), attended.mass.to(queries.dtype), up, bias, skip=n
        )
        return context, attended.weights

    @property
    def _sees_shifts(self) -> bool:
        """Return whether adding the same number to all logits of a query changes its attention.

        It does not under a softmax alone, and in 16 bits it would cost digits of what the softmax does see. Factors of
        key norms and a soft-cap come between.
        """
        return self.geometry.key_norm or self.geometry.logit_cap is not None

    def _absorbable(self) -> bool:
        rebuilt = self.geometry.rope_cache == "rebuilt"
        return is_plain(self.kv_b_proj) and (not rebuilt or is_plain(self.k_rope_proj))

    def _absorbing_saves(self, queries: int, tokens: int) -> bool:
        g = self.geometry
        return absorb.absorbing_saves(
            queries, tokens, g.kv_lora_rank, g.num_attention_heads, g.num_up_heads, g.qk_nope_head_dim, g.v_head_dim
        )


def default_rope_pairs(geometry: MLAGeometry) -> Tensor:
    """Return the pairs [K, R/2] that a model with random weights rotates with: the fastest of the source's D/2.

    Where R is larger than D, the frequencies repeat.
    """
    pairs = torch.arange(geometry.qk_rope_head_dim // 2) % (geometry.head_dim // 2)
    return pairs.repeat(geometry.num_rope_heads, 1)
