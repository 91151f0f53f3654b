"""What one attention layer caches and weighs, before and after conversion. Plain integers; imports no torch.

Letters, used in every file of this package (the full table is `docs/notation.md`):

    d  hidden_size           H  num_attention_heads     G  num_key_value_heads      D  head_dim (of the source)
    r  kv_lora_rank          r_k, r_v  k_/v_lora_rank   r_q  q_lora_rank
    n  qk_nope_head_dim      R  qk_rope_head_dim        K  num_rope_heads           v  v_head_dim
    U  num_up_heads: heads that the up-projection makes, H (each query head its own) or G (shared by H/G query heads)
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

AttentionForm = Literal["source", "decoupled", "full"]
RopeCache = Literal["cached", "rebuilt"]


@dataclass(frozen=True)
class MLAGeometry:
    """Shape of one attention layer.

    `attention_form` says which attention the layer runs:

    - `source`: the model's own multi-head or grouped-query attention; caches `2·G·D` numbers per token.
    - `decoupled`: one joint key/value latent of rank r and a rotary key of K heads (DeepSeek-V2, arXiv 2405.04434,
      section 2.1; MHA2MLA with K = G, X-EcoMLA with K = 1); caches `r + K·R`, or `r` where `rope_cache` is `rebuilt`.
    - `full`: RoPE on every up-projected key dim; two latents (TransMLA, arXiv 2502.07864v1) that cache `r_k + r_v`, or,
      where `kv_lora_rank` is set, one joint latent of r.

    With `key_norm` (an RMSNorm on each key head, as in Qwen3) a decoupled layer also caches one number per key head and
    token, the inverse root mean square of that key, because the norm does not fold into weights. With `latent_bias` the
    projections that read the latent have biases even where the source's keys and values have none: they hold what the
    latent's mean would otherwise cost in rank.
    """

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    attention_form: AttentionForm = "source"
    kv_lora_rank: int = 0
    k_lora_rank: int = 0
    v_lora_rank: int = 0
    q_lora_rank: int | None = None
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    num_rope_heads: int = 1
    v_head_dim: int = 0
    num_up_heads: int = 0
    rope_cache: RopeCache = "cached"
    latent_norm: bool = False
    latent_bias: bool = False
    key_norm: bool = False
    query_bias: bool = False
    key_value_bias: bool = False
    output_bias: bool = False

    @classmethod
    def from_config(cls, config: Any, **features: bool) -> MLAGeometry:
        """Read the fields from one layer's config.

        Args:
            config: Of a source model or of one layer of a converted one. A layer that keeps the source's attention has
                none of the latent fields, whatever the config holds for the other layers.
            features: What the config does not say: biases, norms.
        """
        heads = config.num_attention_heads
        known: dict[str, Any] = {
            "hidden_size": config.hidden_size,
            "num_attention_heads": heads,
            "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
            "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        }
        if getattr(config, "attention_form", "source") != "source":
            names = [f.name for f in fields(cls) if f.name not in known and hasattr(config, f.name)]
            known |= {name: getattr(config, name) for name in names}
        return cls(**{**known, **features})

    @property
    def qk_head_dim(self) -> int:
        """Dims of one query and key head after conversion: n + R."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def up_bias(self) -> bool:
        """Whether the projections that read the latent have a bias."""
        return self.key_value_bias or self.latent_bias

    @property
    def source_cache_numbers(self) -> int:
        """Numbers that the source attention caches per token: keys and values of G heads."""
        return 2 * self.num_key_value_heads * self.head_dim

    @property
    def scale_numbers(self) -> int:
        """Numbers per token that a decoupled layer caches for its key norms: one a key head."""
        return self.num_key_value_heads if self.key_norm and self.attention_form == "decoupled" else 0

    @property
    def rope_numbers(self) -> int:
        """Numbers per token in the second cached tensor of a decoupled layer: rotary key and key-norm scales."""
        rotary = self.num_rope_heads * self.qk_rope_head_dim if self.rope_cache == "cached" else 0
        return rotary + self.scale_numbers

    @property
    def cache_numbers(self) -> int:
        """Numbers cached per token in this layer."""
        if self.attention_form == "source":
            return self.source_cache_numbers
        if self.attention_form == "full":
            return self.kv_lora_rank or self.k_lora_rank + self.v_lora_rank
        return self.kv_lora_rank + self.rope_numbers

    @property
    def cache_ratio(self) -> float:
        """Cached numbers over the source's."""
        return self.cache_numbers / self.source_cache_numbers

    def cache_bytes(self, bits: float = 16) -> float:
        """Bytes cached per token in this layer at `bits` per number."""
        return self.cache_numbers * bits / 8

    @property
    def source_parameters(self) -> int:
        """Parameters of the source attention: q, k, v, o projections, their biases and the query and key norms."""
        query, key_value = self.num_attention_heads * self.head_dim, 2 * self.num_key_value_heads * self.head_dim
        weights = self.hidden_size * (2 * query + key_value)
        biases = self.query_bias * query + self.key_value_bias * key_value + self.output_bias * self.hidden_size
        return weights + biases + self.key_norm * 2 * self.head_dim

    @property
    def parameters(self) -> int:
        """Parameters of this attention layer as it is."""
        if self.attention_form == "source":
            return self.source_parameters
        weights = self._full_parameters() if self.attention_form == "full" else self._decoupled_parameters()
        return weights + self.output_bias * self.hidden_size

    @property
    def parameters_added(self) -> int:
        """Parameters more than the source attention's (negative: fewer)."""
        return self.parameters - self.source_parameters

    def _full_parameters(self) -> int:
        d, query = self.hidden_size, self.num_attention_heads * self.head_dim
        up = self.num_up_heads * self.head_dim
        if self.kv_lora_rank:
            down_and_up = self.kv_lora_rank * (d + 2 * up)
        else:
            down_and_up = (self.k_lora_rank + self.v_lora_rank) * (d + up)
        biases = self.query_bias * query + self.up_bias * 2 * up
        return 2 * d * query + down_and_up + biases + self.key_norm * 2 * self.head_dim

    def _decoupled_parameters(self) -> int:
        d, r, heads, up_heads = self.hidden_size, self.kv_lora_rank, self.num_attention_heads, self.num_up_heads
        query, rotary = heads * self.qk_head_dim, self.num_rope_heads * self.qk_rope_head_dim
        r_q = self.q_lora_rank
        queries = d * query if r_q is None else r_q * (d + query + self.latent_norm)
        rope_input = d if self.rope_cache == "cached" else r
        up = up_heads * (self.qk_nope_head_dim + self.v_head_dim)
        rebuilt = self.rope_cache == "rebuilt"
        biases = self.query_bias * query + self.up_bias * up + self.key_value_bias * r
        biases += rotary * (self.up_bias if rebuilt else self.key_value_bias)
        norms = self.latent_norm * r
        if self.key_norm:  # the query heads' gains, and the source's key projection for the keys' norms
            keys = self.num_key_value_heads * self.head_dim
            norms += self.num_rope_heads * self.qk_head_dim + keys * (d + self.key_value_bias)
        return queries + d * r + rope_input * rotary + r * up + heads * self.v_head_dim * d + biases + norms


@dataclass(frozen=True)
class ModelGeometry:
    """All attention layers of a model, in order."""

    layers: tuple[MLAGeometry, ...]

    @property
    def cache_numbers(self) -> int:
        """Numbers cached per token, all layers together."""
        return sum(layer.cache_numbers for layer in self.layers)

    @property
    def source_cache_numbers(self) -> int:
        """Numbers that the source model caches per token, all layers together."""
        return sum(layer.source_cache_numbers for layer in self.layers)

    @property
    def cache_ratio(self) -> float:
        """Cached numbers over the source's."""
        return self.cache_numbers / self.source_cache_numbers

    def cache_bytes(self, tokens: int = 1, bits: float = 16) -> float:
        """Bytes of the cache for `tokens` tokens at `bits` per number."""
        return self.cache_numbers * tokens * bits / 8

    @property
    def parameters_added(self) -> int:
        """Parameters more than in the source model (negative: fewer)."""
        return sum(layer.parameters_added for layer in self.layers)
