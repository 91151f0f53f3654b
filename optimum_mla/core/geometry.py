"""Shape, cache size and parameter count of attention layers before and after conversion. Imports no torch.

Letters, used in every file of this package (the full table is `docs/notation.md`):

    d  hidden_size           H  num_attention_heads     G  num_key_value_heads      D  head_dim (of the source)
    r  kv_lora_rank          r_k, r_v  k_/v_lora_rank   r_q  q_lora_rank
    n  qk_nope_head_dim      R  qk_rope_head_dim        K  num_rope_heads           v  v_head_dim
    U  num_up_heads, the heads that the up-projection makes: H (one for each query head) or G (shared by H/G of them)
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

AttentionForm = Literal["source", "decoupled", "full"]
RopeCache = Literal["cached", "rebuilt"]


@dataclass(frozen=True)
class CachedPart:
    """A part of what a layer caches for each token. Parts of one tensor lie side by side, in order.

    Attributes:
        name: What the numbers are, such as "rotary key".
        tensor: Which of the layer's two cached tensors holds them, 0 or 1.
        width: Number of numbers per token.
        setting: The field of `CacheSettings` that gives their bits, or None if they stay in the model's dtype.
    """

    name: str
    tensor: Literal[0, 1]
    width: int
    setting: Literal["bits", "rope_bits"] | None = None


@dataclass(frozen=True, slots=True)  # without `__dict__`, which exporters would write to
class MLAGeometry:
    """The shape of one attention layer.

    `attention_form` says which attention the layer has:

    - `source` is the model's own multi-head or grouped-query attention, which caches `2·G·D` numbers per token.
    - `decoupled` has one joint key/value latent of rank r and a rotary key of K heads (DeepSeek-V2, arXiv 2405.04434,
      section 2.1; MHA2MLA with K = G, X-EcoMLA with K = 1). It caches `r + K·R` numbers per token, or `r` if
      `rope_cache` is `rebuilt`.
    - `full` applies RoPE to every up-projected key dim. It has two latents (TransMLA, arXiv 2502.07864v1), which cache
      `r_k + r_v` numbers per token, or one joint latent of rank r if `kv_lora_rank` is set.

    With `key_norm` (an RMSNorm on each key head, as in Qwen3) a decoupled layer also caches one number per key head and
    token, the inverse root mean square of that key, because the norm cannot be folded into weights. With `joint_norms`
    (a norm over all heads, as in OLMo 2) it is one number per token. With `logit_cap` c, scaled logits x become
    c·tanh(x / c), as in Gemma 2. With `latent_bias`
    the projections that read the latent have biases even if the source's keys and values have none. These biases hold
    the mean of keys and values, which would otherwise need rank.
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
    joint_norms: bool = False
    logit_cap: float | None = None
    query_bias: bool = False
    key_value_bias: bool = False
    output_bias: bool = False

    @classmethod
    def from_config(cls, config: Any, **features: Any) -> MLAGeometry:
        """Return the shape that a config describes.

        Args:
            config: The config of a source model, or of one layer of a converted model. If the layer keeps the source's
                attention, latent fields that the config holds for other layers are ignored.
            features: Fields that the config does not hold under these names: biases, norms and the cap of the logits.
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
        """Dims of one query or key head after conversion, n + R."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def up_bias(self) -> bool:
        """Return whether the projections that read the latent have a bias."""
        return self.key_value_bias or self.latent_bias

    @property
    def down_bias(self) -> bool:
        """Return whether the projection to the joint latent has a bias."""
        return self.key_value_bias and self.attention_form == "decoupled"

    @property
    def source_cache_numbers(self) -> int:
        """Numbers that the source attention caches per token, which are the keys and values of G heads."""
        return 2 * self.num_key_value_heads * self.head_dim

    @property
    def key_factors(self) -> int:
        """Number of factors by which a key norm multiplies the keys of a token."""
        return 1 if self.joint_norms else self.num_key_value_heads

    @property
    def query_gains(self) -> int:
        """Number of gain vectors of a decoupled layer's query norm, each of which serves as many consecutive heads."""
        if self.joint_norms:
            return self.num_attention_heads
        return self.num_rope_heads

    @property
    def cached_parts(self) -> tuple[CachedPart, ...]:
        """Return the parts that this layer caches for each token; the cache and its predicted size follow them."""
        if self.attention_form == "source":
            width = self.num_key_value_heads * self.head_dim
            return CachedPart("keys", 0, width), CachedPart("values", 1, width)
        if self.attention_form == "full" and not self.kv_lora_rank:
            return (
                CachedPart("key latent", 0, self.k_lora_rank, "bits"),
                CachedPart("value latent", 1, self.v_lora_rank, "bits"),
            )
        parts = [CachedPart("latent", 0, self.kv_lora_rank, "bits")]
        if self.attention_form == "decoupled":
            if self.rope_cache == "cached":
                parts.append(CachedPart("rotary key", 1, self.num_rope_heads * self.qk_rope_head_dim, "rope_bits"))
            if self.key_norm:
                parts.append(CachedPart("key factors", 1, self.key_factors))
        return tuple(parts)

    @property
    def cache_numbers(self) -> int:
        """Numbers that this layer caches per token."""
        return sum(part.width for part in self.cached_parts)

    def cached_width(self, tensor: int) -> int:
        """Return the numbers per token in one of the two cached tensors, 0 or 1."""
        return sum(part.width for part in self.cached_parts if part.tensor == tensor)

    @property
    def cached_key_factors(self) -> int:
        """Numbers that this layer caches per token for its key norms, which end the second cached tensor."""
        return sum(part.width for part in self.cached_parts if part.name == "key factors")

    @property
    def cache_ratio(self) -> float:
        """Numbers that are cached per token divided by the source's."""
        return self.cache_numbers / self.source_cache_numbers

    def cache_bytes(self, bits: float = 16) -> float:
        """Return the bytes that this layer caches per token at `bits` per number."""
        return self.cache_numbers * bits / 8

    @property
    def source_parameters(self) -> int:
        """Parameters of the source attention: four projections, their biases, and the query and key norms."""
        query, key_value = self.num_attention_heads * self.head_dim, 2 * self.num_key_value_heads * self.head_dim
        weights = self.hidden_size * (2 * query + key_value)
        biases = self.query_bias * query + self.key_value_bias * key_value + self.output_bias * self.hidden_size
        normed = self.num_attention_heads + self.num_key_value_heads if self.joint_norms else 2
        return weights + biases + self.key_norm * normed * self.head_dim

    @property
    def parameters(self) -> int:
        """Parameters of this attention layer."""
        if self.attention_form == "source":
            return self.source_parameters
        weights = self._full_parameters() if self.attention_form == "full" else self._decoupled_parameters()
        return weights + self.output_bias * self.hidden_size

    @property
    def parameters_added(self) -> int:
        """Parameters of this layer minus those of the source attention; negative if there are fewer."""
        return self.parameters - self.source_parameters

    def _full_parameters(self) -> int:
        d, query = self.hidden_size, self.num_attention_heads * self.head_dim
        up = self.num_up_heads * self.head_dim
        if self.kv_lora_rank:
            down_and_up = self.kv_lora_rank * (d + 2 * up + self.down_bias)
        else:
            down_and_up = (self.k_lora_rank + self.v_lora_rank) * (d + up)
        biases = self.query_bias * query + self.up_bias * 2 * up
        normed = self.num_attention_heads + self.num_key_value_heads if self.joint_norms else 2
        return 2 * d * query + down_and_up + biases + self.key_norm * normed * self.head_dim

    def _decoupled_parameters(self) -> int:
        d, r, heads, up_heads = self.hidden_size, self.kv_lora_rank, self.num_attention_heads, self.num_up_heads
        query, rotary = heads * self.qk_head_dim, self.num_rope_heads * self.qk_rope_head_dim
        r_q = self.q_lora_rank
        queries = d * query if r_q is None else r_q * (d + query + self.latent_norm)
        rope_input = d if self.rope_cache == "cached" else r
        up = up_heads * (self.qk_nope_head_dim + self.v_head_dim)
        rebuilt = self.rope_cache == "rebuilt"
        biases = self.query_bias * query + self.up_bias * up + self.down_bias * r
        biases += rotary * (self.up_bias if rebuilt else self.key_value_bias)
        norms = self.latent_norm * r
        if self.key_norm:
            # The gains of the query heads, and the source's key projection, which the key norms are computed with.
            keys = self.num_key_value_heads * self.head_dim
            gains = self.query_gains
            norms += gains * self.qk_head_dim + keys * (d + self.key_value_bias)
        return queries + d * r + rope_input * rotary + r * up + heads * self.v_head_dim * d + biases + norms


@dataclass(frozen=True)
class ModelGeometry:
    """The shapes of all attention layers of a model, in order."""

    layers: tuple[MLAGeometry, ...]

    @property
    def cache_numbers(self) -> int:
        """Numbers that all layers together cache per token."""
        return sum(layer.cache_numbers for layer in self.layers)

    @property
    def source_cache_numbers(self) -> int:
        """Numbers that all layers of the source model together cache per token."""
        return sum(layer.source_cache_numbers for layer in self.layers)

    @property
    def cache_ratio(self) -> float:
        """Numbers that are cached per token divided by the source's."""
        return self.cache_numbers / self.source_cache_numbers

    def cache_bytes(self, tokens: int = 1, bits: float = 16) -> float:
        """Return the bytes of the cache for `tokens` tokens at `bits` per number."""
        return tokens * sum(layer.cache_bytes(bits) for layer in self.layers)

    @property
    def parameters_added(self) -> int:
        """Parameters of the attention minus those of the source model's; negative if there are fewer."""
        return sum(layer.parameters_added for layer in self.layers)
