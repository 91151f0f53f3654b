"""The full form: a key latent and a value latent, RoPE behind the up-projection."""

from __future__ import annotations

from torch import Tensor, nn

from optimum_mla.geometry import MLAGeometry
from optimum_mla.nn.attention import LatentAttention, is_plain
from optimum_mla.nn.norm import HeadRMSNorm
from optimum_mla.ops import absorb
from optimum_mla.ops.rotary import Rotation, rotate


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
        return is_plain(self.v_b_proj)

    def _absorbing_saves(self, queries: int, tokens: int) -> bool:
        g = self.geometry
        return absorb.absorbing_saves(
            queries, tokens, g.v_lora_rank, g.num_attention_heads, g.num_up_heads, 0, g.v_head_dim
        )
