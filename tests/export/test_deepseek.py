"""The deepseek_v3 export beside the converted model: logits, frequencies, bounds, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers import DeepseekV3ForCausalLM, DynamicCache, PreTrainedModel
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm

from optimum_mla import GQA2MLA, MHA2MLA, XEcoMLA
from optimum_mla.core.errors import InvalidValueError, UnsupportedModelError
from optimum_mla.export.constant_channel import (
    CONSTANT,
    LARGEST_LATENT,
    NormedLatent,
    Projection,
    constant_norm,
)
from optimum_mla.export.deepseek import export_deepseek
from optimum_mla.export.tensors import rotary_places
from optimum_mla.stack import CACHE_ARGUMENT
from tests.cases import source_model, token_ids

FAMILIES = (
    "llama",
    "llama with biases",
    "llama with scaled rope",
    "llama with yarn",
    "llama multi-head, tied",
    "mistral",
    "qwen2",
)
CALIBRATION = token_ids(6, 24)
METHODS: dict[str, Callable[[], Any]] = {
    "x-ecomla": lambda: XEcoMLA(kv_cache_ratio=0.5),
    "x-ecomla, query latent": lambda: XEcoMLA(kv_lora_rank=24, rope_selection="last", q_lora_rank=40),
    "gqa2mla": lambda: GQA2MLA(kv_cache_ratio=0.75, rope_cache="cached", shared_rope=True, calibration=CALIBRATION),
}


def logits(model: PreTrainedModel, ids: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(token_ids() if ids is None else ids).logits.float()


@pytest.mark.compat
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_converted_models(family: str, method: str) -> None:
    native = METHODS[method]()(source_model(family))
    exported = export_deepseek(native)
    assert isinstance(exported, DeepseekV3ForCausalLM)
    assert (logits(exported) - logits(native)).abs().max() < 1e-5
    # Layers of one size, with one channel more.
    assert {layer.kv_lora_rank + 1 for layer in native.geometry.layers} == {exported.config.kv_lora_rank}
    tied = exported.lm_head.weight is exported.model.embed_tokens.weight
    assert tied == native.config.tie_word_embeddings


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("family", "method"), [("llama", "gqa2mla"), ("qwen2", "x-ecomla"), ("mistral", "x-ecomla")])
def test_16_bits_lose_no_more_than_the_converted_model_loses(family: str, method: str, dtype: torch.dtype) -> None:
    exact = METHODS[method]()(source_model(family))
    wanted, exported = logits(exact), export_deepseek(exact)
    rounded = export_deepseek(METHODS[method]()(source_model(family, dtype)))
    assert rounded.dtype is dtype
    assert (logits(exported) - wanted).abs().max() < 1e-5
    own = (logits(exact.to(dtype)) - wanted).square().mean().sqrt()
    assert (logits(rounded) - wanted).square().mean().sqrt() < 1.5 * own


@pytest.mark.parametrize("family", ["llama with scaled rope", "llama with yarn", "llama"])
def test_frequencies_are_the_sources(family: str) -> None:
    source = source_model(family)
    frequencies = source.model.rotary_emb.inv_freq.clone()
    native = METHODS["gqa2mla"]()(source)
    exported = export_deepseek(native)
    pairs = native.model.layers[0].self_attn.rope_pairs[0].sort().values
    torch.testing.assert_close(exported.model.rotary_emb.inv_freq, frequencies[pairs], rtol=1e-6, atol=0.0)
    assert exported.model.rotary_emb.attention_scaling == 1.0
    for attention in (layer.self_attn for layer in native.model.layers):
        assert torch.equal(attention.rope_pairs[0].sort().values, pairs)


def test_frequencies_of_a_plain_series_need_no_factors() -> None:
    native = XEcoMLA(kv_lora_rank=24, rope_selection="last")(source_model("llama"))
    exported = export_deepseek(native)
    assert exported.config.rope_parameters["rope_type"] == "default"
    assert (logits(exported) - logits(native)).abs().max() < 1e-5


def test_beyond_the_sources_context_nothing_changes() -> None:
    native = METHODS["x-ecomla"]()(source_model("llama with scaled rope", max_position_embeddings=16))
    ids = token_ids(1, 40)
    assert (logits(export_deepseek(native), ids) - logits(native, ids)).abs().max() < 1e-5


def test_layers_of_lower_rank_are_padded() -> None:
    method = GQA2MLA(
        kv_cache_ratio=0.5, rope_cache="cached", shared_rope=True, calibration=CALIBRATION, rank_allocation="energy"
    )
    native = method(source_model("qwen2"))
    ranks = {layer.kv_lora_rank for layer in native.geometry.layers}
    assert len(ranks) > 1
    with pytest.raises(UnsupportedModelError, match=r"latents have ranks from .*--pad"):
        export_deepseek(native)
    exported = export_deepseek(native, pad=True)
    assert exported.config.kv_lora_rank == max(ranks) + 1
    assert (logits(exported) - logits(native)).abs().max() < 1e-5


def normed(family: str = "llama") -> PreTrainedModel:
    """A converted model that norms its latents itself."""
    return irregular(family, latent_norm=True)


def irregular(family: str = "llama", **options: Any) -> PreTrainedModel:
    """A converted model with 6 of 16 rotary dims, which follow from no base."""
    sizes = {"kv_cache_ratio": 0.75, "qk_rope_head_dim": 6, "calibration": CALIBRATION, **options}
    return GQA2MLA(rope_cache="cached", shared_rope=True, **sizes)(source_model(family, rms_norm_eps=1e-3))


@pytest.mark.parametrize("form", [*METHODS, "normed", "irregular"])
def test_padding_to_a_size_changes_nothing_but_the_sizes(form: str) -> None:
    made = {"normed": normed, "irregular": irregular}
    native = made[form]() if form in made else METHODS[form]()(source_model("llama"))
    g = native.geometry.layers[0]
    wanted = logits(native)
    for rope in (g.qk_rope_head_dim, g.head_dim, g.head_dim + 4):
        exported = export_deepseek(native, pad_to=(48, rope))
        assert (exported.config.kv_lora_rank, exported.config.qk_rope_head_dim) == (48, rope)
        assert (logits(exported) - wanted).abs().max() < 1e-5
        cache = DynamicCache()
        exported(token_ids(), **{CACHE_ARGUMENT: cache})
        latent, rotary = cache.layers[0].keys, cache.layers[0].values
        assert (latent.shape[-1], rotary.shape[-1]) == (48, rope)
        # What is added is zero in the cache too. The constant channel is the last one.
        used = g.kv_lora_rank
        assert not latent[..., used : 47 if form != "normed" else 48].any()
        assert int(rotary.abs().amax((0, 1, 2)).gt(0).sum()) == g.qk_rope_head_dim


def test_all_pairs_of_the_source_need_no_factors() -> None:
    native = METHODS["x-ecomla"]()(source_model("llama"))
    assert export_deepseek(native).config.rope_parameters["rope_type"] == "longrope"
    padded = export_deepseek(native, pad_to=(48, native.geometry.layers[0].head_dim))
    assert padded.config.rope_parameters["rope_type"] == "default"


def test_padding_to_less_is_refused() -> None:
    native = METHODS["gqa2mla"]()(source_model("llama"))
    g = native.geometry.layers[0]
    least = f"got '8\\+64', allowed: a latent from {g.kv_lora_rank + 1} and .* from {g.qk_rope_head_dim}"
    with pytest.raises(InvalidValueError, match=f"^pad_to: {least}"):
        export_deepseek(native, pad_to=(8, 64))
    with pytest.raises(InvalidValueError, match="even number"):
        export_deepseek(native, pad_to=(64, g.qk_rope_head_dim + 1))


@given(st.data())
def test_rotary_pairs_stand_where_one_base_gives_their_frequencies(data: st.DataObject) -> None:
    most = data.draw(st.sampled_from([4, 8, 32]))
    given_pairs = sorted(data.draw(st.lists(st.integers(0, most - 1), min_size=1, max_size=2 * most)))
    count = data.draw(st.integers(len(given_pairs), 2 * most))
    places = rotary_places(torch.tensor(given_pairs), count, most).tolist()
    assert places == sorted(set(places))
    assert 0 <= places[0] <= places[-1] < count
    wanted = [pair * count / most for pair in given_pairs]
    regular = len(set(wanted)) == len(wanted) and all(place.is_integer() for place in wanted)
    assert places == (wanted if regular else list(range(len(given_pairs))))


@pytest.mark.parametrize("method", ["gqa2mla", "x-ecomla"])
def test_a_latent_norm_of_its_own_is_carried_without_any_bias(method: str) -> None:
    options: dict[str, Any] = {"kv_cache_ratio": 0.75, "latent_norm": True, "calibration": CALIBRATION}
    made = {
        "gqa2mla": lambda: GQA2MLA(rope_cache="cached", shared_rope=True, **options),
        "x-ecomla": lambda: XEcoMLA(shared_rope=True, q_lora_rank=40, **options),
    }[method]()
    native = made(source_model("llama", rms_norm_eps=1e-3))
    assert not any("kv" in name and name.endswith("bias") for name, _ in native.named_parameters())
    exported = export_deepseek(native)
    assert (logits(exported) - logits(native)).abs().max() < 1e-5
    assert not any(name.endswith("bias") for name, _ in exported.named_parameters())
    assert exported.config.rope_interleave
    assert exported.config.kv_lora_rank == native.geometry.layers[0].kv_lora_rank
    # The gain is the calibration data's own size times a power of two, so the norm is close to only scaling.
    attention, seen = native.model.layers[1].self_attn, []
    attention.kv_a_layernorm.register_forward_hook(lambda _, given, made: seen.append((given[0], made)))
    logits(native, CALIBRATION)
    before, after = seen[0]
    scale = 2.0 ** round(math.log2((before.norm() / after.norm()).item()))
    assert ((scale * after - before).norm() / before.norm()).item() < 0.5
    assert scale * after.norm().item() == pytest.approx(before.norm().item(), rel=0.2)


@pytest.mark.compat
@pytest.mark.parametrize("implementation", ["dynamic", "static", "quantized"])
def test_it_generates_what_the_converted_model_generates(implementation: str) -> None:
    native = METHODS["gqa2mla"]()(source_model("qwen2"))
    exported, ids = export_deepseek(native), token_ids(2, 9)
    greedy: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    wanted = native.generate(ids, attention_mask=mask, **greedy)
    config = {"backend": "hqq", "nbits": 8, "axis_key": 1, "axis_value": 1, "residual_length": 64, "q_group_size": 18}
    extra = {"cache_config": config} if implementation == "quantized" else {}
    given = exported.generate(ids, attention_mask=mask, cache_implementation=implementation, **extra, **greedy)
    assert torch.equal(given, wanted)


def test_its_cache_holds_the_latent() -> None:
    exported = export_deepseek(METHODS["gqa2mla"]()(source_model("llama")))
    with torch.no_grad():
        cache = exported(token_ids(2, 10), use_cache=True).past_key_values
    config = exported.config
    for layer in cache.layers:
        assert layer.keys.shape == (2, 1, 10, config.kv_lora_rank)
        assert layer.values.shape == (2, 1, 10, config.qk_rope_head_dim)


def normed_map(made: NormedLatent, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The map of `constant_norm` as DeepSeek computes it, and the latent before its norm."""
    norm = DeepseekV3RMSNorm(len(made.gain)).to(dtype)
    norm.weight.data = made.gain.to(dtype)
    latent = F.linear(x.to(dtype), made.down.to(dtype), made.bias.to(dtype))
    return F.linear(norm(latent), made.up.to(dtype)).double(), latent[..., :-1].double()


@given(
    width=st.integers(2, 40),
    rank=st.integers(1, 20),
    spare=st.integers(0, 3),
    scale=st.sampled_from([1e-4, 1.0, 3e3]),
    biased=st.booleans(),
)
def test_the_constant_makes_the_norm_an_identity(width: int, rank: int, spare: int, scale: float, biased: bool) -> None:
    generator = torch.Generator().manual_seed(width * 100 + rank)
    down, up = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((rank, width), (7, rank)))
    down_bias = torch.randn(rank, generator=generator, dtype=torch.float64) if biased else None
    up_bias = torch.randn(7, generator=generator, dtype=torch.float64) if biased else None
    x = torch.randn(50, width, generator=generator, dtype=torch.float64)
    x = scale * math.sqrt(width) * x / x.norm(dim=-1, keepdim=True)
    longest = scale * math.sqrt(width)
    made = constant_norm(Projection(down, down_bias), Projection(up, up_bias), longest, rank + spare, torch.float32)
    given, latent = normed_map(made, x, torch.float32)
    wanted = (x @ down.T + (0 if down_bias is None else down_bias)) @ up.T + (0 if up_bias is None else up_bias)
    assert latent.norm(dim=-1).max() <= LARGEST_LATENT * (1 + 1e-6)
    assert made.bias[-1] == CONSTANT
    assert (given - wanted).abs().max() <= 2e-6 * wanted.abs().max() + 1e-6 * wanted.norm() / math.sqrt(len(x))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_it_holds_for_latents_a_hundred_times_as_large(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    down, up, x = (
        torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((32, 64), (48, 32), (200, 64))
    )
    x = 8 * x / x.norm(dim=-1, keepdim=True)
    made = constant_norm(Projection(down), Projection(up), 8.0, 32, dtype)
    for factor in (1.0, 100.0):
        given, _ = normed_map(made, factor * x, dtype)
        wanted = factor * x @ down.T @ up.T
        assert (given - wanted).norm() / wanted.norm() < tolerance


REFUSED: dict[str, tuple[str, Callable[[], Any], str, dict[str, Any]]] = {
    "a rotary key per head": ("llama", lambda: MHA2MLA(kv_cache_ratio=0.5), r"2 rotary keys.*--rope-cache cached", {}),
    "rebuilt": ("llama", lambda: GQA2MLA(kv_cache_ratio=0.5, calibration=CALIBRATION), r"rebuilt.*--shared-rope", {}),
    "rotation of everything": ("llama", lambda: GQA2MLA(), r"positional full.*--shared-rope", {}),
    "norms on keys": ("qwen3", lambda: XEcoMLA(kv_cache_ratio=0.5), r"norms its queries and keys", {}),
    "a sliding window": ("mistral with a window", lambda: XEcoMLA(kv_cache_ratio=0.5), r"sliding window", {}),
    "a hybrid": ("llama", lambda: XEcoMLA(kv_cache_ratio=0.5, layers=[0, 2]), r"layer 1 keeps.*Convert all", {}),
    "biases after a norm": (
        "qwen2",
        lambda: XEcoMLA(kv_cache_ratio=0.5, latent_norm=True),
        r"no place for biases\. Convert without the latent norm",
        {},
    ),
    "rotation that depends on the length": (
        "llama",
        lambda: XEcoMLA(kv_cache_ratio=0.5),
        r"dynamic rotary scaling depends on the length",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "biases in the feed-forward layers": (
        "llama",
        lambda: XEcoMLA(kv_cache_ratio=0.5),
        r"feed-forward layers have biases",
        {"mlp_bias": True},
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_deepseek_cannot_express_is_refused(case: str) -> None:
    family, method, message, changes = REFUSED[case]
    native = method()(source_model(family, **changes))
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        export_deepseek(native)
    assert "\n" not in str(caught.value)


def test_layers_that_rotate_differently_are_refused() -> None:
    native = METHODS["x-ecomla"]()(source_model("llama"))
    pairs = native.model.layers[1].self_attn.rope_pairs
    pairs.copy_(7 - pairs)
    with pytest.raises(UnsupportedModelError, match=r"different frequencies.*--shared-rope"):
        export_deepseek(native)


def test_a_source_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="not converted"):
        export_deepseek(source_model("llama"))
