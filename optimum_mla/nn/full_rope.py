"""The full form: RoPE after the up-projection; a key and a value latent, or one for both."""

from __future__ import annotations

from torch import Tensor, nn

from optimum_mla.core.geometry import MLAGeometry
from optimum_mla.nn.attention import LatentAttention
from optimum_mla.nn.norm import HeadRMSNorm
from optimum_mla.nn.plain import is_plain
from optimum_mla.nn.projections import FULL
from optimum_mla.ops import absorb
from optimum_mla.ops.blocks import Block, CacheView, Latents
from optimum_mla.ops.blockwise import Sums, attend, capped, scaled_queries, softmax_sums
from optimum_mla.ops.rotary import RotaryFrames, Rotation, rotate


class FullRopeLatentAttention(LatentAttention):
    """Keys and values from latents, RoPE on every up-projected key dim (TransMLA, arXiv 2502.07864v1, section 4).

        c_K = k_a(x)  [B, 1, T, r_k]     c_V = v_a(x)  [B, 1, T, r_v]        both cached, neither carries position
        logit(h, t) = rope(q(h))·rope(W_UK(h) c_K,t)              o(h) = W_UV(h) Σ_t p_t c_V,t

    With one joint latent, c_K = c_V = kv_a(x) [B, 1, T, r], and the second cached tensor is empty.
    The rotation stands between the up-projection and the query, so keys are always expanded; values can be absorbed.
    """

    roles = FULL

    def _build(self, g: MLAGeometry, eps: float) -> None:
        self.q_proj = nn.Linear(g.hidden_size, g.num_attention_heads * g.head_dim, bias=g.query_bias)
        key_rank, self.value_rank = g.kv_lora_rank or g.k_lora_rank, g.kv_lora_rank or g.v_lora_rank
        if g.kv_lora_rank:
            self.kv_a_proj = nn.Linear(g.hidden_size, g.kv_lora_rank, bias=g.down_bias)
        else:
            self.k_a_proj = nn.Linear(g.hidden_size, g.k_lora_rank, bias=False)
            self.v_a_proj = nn.Linear(g.hidden_size, g.v_lora_rank, bias=False)
        self.k_b_proj = nn.Linear(key_rank, g.num_up_heads * g.head_dim, bias=g.up_bias)
        self.v_b_proj = nn.Linear(self.value_rank, g.num_up_heads * g.head_dim, bias=g.up_bias)
        if g.key_norm:
            heads = (g.num_attention_heads, g.num_key_value_heads) if g.joint_norms else (1, 1)
            self.q_norm, self.k_norm = (HeadRMSNorm(gains, g.head_dim, eps, joint=g.joint_norms) for gains in heads)

    def _heads(self, flat: Tensor) -> Tensor:
        """Split [B, T, heads·D] into heads [B, heads, T, D]."""
        return flat.unflatten(-1, (-1, self.geometry.head_dim)).transpose(1, 2)

    def _queries(self, hidden_states: Tensor) -> Tensor:
        queries = self._heads(self.q_proj(hidden_states))
        return self.q_norm(queries) if self.geometry.key_norm else queries

    def _rotation(self, turns: tuple[Tensor, Tensor]) -> Rotation:
        return Rotation(*(part.unsqueeze(1) for part in turns))

    def _rotate_queries(self, queries: Tensor, rotation: Rotation) -> Tensor:
        return rotate(queries, rotation)

    def needs_cached_positions(self) -> bool:
        return True

    def _latents(self, hidden_states: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        if self.geometry.kv_lora_rank:
            latent = self.kv_a_proj(hidden_states).unsqueeze(1)
            return latent, latent[..., :0]
        return self.k_a_proj(hidden_states).unsqueeze(1), self.v_a_proj(hidden_states).unsqueeze(1)

    def _value_latent(self, block: Block) -> Latents:
        return block.first if self.geometry.kv_lora_rank else block.second

    def _keys(self, latents: Latents, rotation: Rotation | None) -> Tensor:
        """Return keys [B, U, T, D], rotated, of the latents of some tokens."""
        up = self.k_b_proj
        # Outside of the module the product may follow the order in which the latents lie in memory.
        flat = latents.project(up.weight, up.bias) if is_plain(up) else up(latents.dense())
        keys = self._heads(flat)
        keys = self.k_norm(keys) if self.geometry.key_norm else keys
        return rotate(keys, rotation) if rotation is not None else keys

    def _expand(self, block: Block, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        values = self._heads(self.v_b_proj(self._value_latent(block).dense()))
        return self._keys(block.first, rotation).to(values.dtype), values

    def _absorbed(
        self, queries: Tensor, view: CacheView, frames: RotaryFrames | None, mask: Tensor | None, keep_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        g = self.geometry
        scaled, (heads, length) = scaled_queries(queries, self.scaling), queries.shape[1:3]

        def partial(block: Block, span: slice, mask: Tensor | None) -> Sums:
            rotated, key_rotation = scaled, None
            if frames is not None:
                rotated, key_rotation = self._rotate_queries(scaled, frames.query(span)), frames.key(span)
            keys = self._keys(block.first, key_rotation)
            values = self._value_latent(block)

            def combine(weights: Tensor) -> Tensor:
                return values.context(weights.flatten(1, 2)).unflatten(1, (heads, length))

            logits = capped(absorb.grouped_logits(rotated, keys), g.logit_cap)
            return softmax_sums(logits, combine, mask, self._dropout)

        attended = attend(view, partial, mask, keep_weights)
        up = self.v_b_proj.weight.view(g.num_up_heads, g.head_dim, self.value_rank)
        bias = self.v_b_proj.bias
        value_bias = None if bias is None else bias.view(g.num_up_heads, g.head_dim)
        context, mass = attended.context.to(queries.dtype), attended.mass.to(queries.dtype)
        return absorb.up_projected_context(context, mass, up, value_bias), attended.weights

    def _absorbable(self) -> bool:
        return is_plain(self.v_b_proj)

    def _absorbing_saves(self, queries: int, tokens: int) -> bool:
        g = self.geometry
        return absorb.absorbing_saves(
            queries, tokens, self.value_rank, g.num_attention_heads, g.num_up_heads, 0, g.v_head_dim
        )
