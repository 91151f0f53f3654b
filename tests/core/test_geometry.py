"""Cache sizes and parameter counts of single layers and models, against hand-computed values and weight shapes."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimum_mla.core.geometry import MLAGeometry, ModelGeometry

# d 64, 4 query heads, 2 key heads, head dim 16: 2·2·16 = 64 numbers cached per token.
SOURCE = MLAGeometry(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
DECOUPLED = replace(
    SOURCE,
    attention_form="decoupled",
    kv_lora_rank=20,
    qk_nope_head_dim=12,
    qk_rope_head_dim=4,
    num_rope_heads=2,
    v_head_dim=16,
    num_up_heads=2,
)
FULL = replace(SOURCE, attention_form="full", k_lora_rank=24, v_lora_rank=8, num_up_heads=4)


def source_shapes(layer: MLAGeometry) -> list[tuple[int, ...]]:
    """Shape of every parameter of the source attention."""
    d, query, key = (
        layer.hidden_size,
        layer.num_attention_heads * layer.head_dim,
        layer.num_key_value_heads * layer.head_dim,
    )
    shapes: list[tuple[int, ...]] = [(query, d), (key, d), (key, d), (d, query)]
    if layer.query_bias:
        shapes.append((query,))
    if layer.key_value_bias:
        shapes += [(key,), (key,)]
    if layer.output_bias:
        shapes.append((d,))
    if layer.key_norm:
        shapes += [(layer.head_dim,), (layer.head_dim,)]  # gains of queries and keys
    return shapes


def decoupled_shapes(layer: MLAGeometry) -> list[tuple[int, ...]]:
    """Shape of every parameter of a decoupled layer."""
    d, r, heads, up_heads = layer.hidden_size, layer.kv_lora_rank, layer.num_attention_heads, layer.num_up_heads
    n, rope, v = layer.qk_nope_head_dim, layer.qk_rope_head_dim, layer.v_head_dim
    shapes: list[tuple[int, ...]] = [
        (r, d),  # down-projection of keys and values
        (up_heads * n, r),  # up-projection of keys
        (up_heads * v, r),  # up-projection of values
        (layer.num_rope_heads * rope, d if layer.rope_cache == "cached" else r),  # rotary key
        (d, heads * v),  # output
    ]
    if layer.q_lora_rank is None:
        shapes += [(heads * n, d), (heads * rope, d)]
    else:
        shapes += [(layer.q_lora_rank, d), (heads * n, layer.q_lora_rank), (heads * rope, layer.q_lora_rank)]
        if layer.latent_norm:
            shapes.append((layer.q_lora_rank,))
    if layer.latent_norm:
        shapes.append((r,))
    if layer.query_bias:
        shapes += [(heads * n,), (heads * rope,)]
    rope_bias = (layer.num_rope_heads * rope,)
    if layer.key_value_bias or layer.latent_bias:
        shapes += [(up_heads * n,), (up_heads * v,)]
    if layer.key_value_bias:
        shapes += [(r,), rope_bias]
    elif layer.latent_bias and layer.rope_cache == "rebuilt":
        shapes.append(rope_bias)
    if layer.output_bias:
        shapes.append((d,))
    if layer.key_norm:
        shapes.append((layer.num_rope_heads, n + rope))  # rotary heads split their dims differently
        shapes.append((layer.num_key_value_heads * layer.head_dim, d))  # the source's keys, for their size
        if layer.key_value_bias:
            shapes.append((layer.num_key_value_heads * layer.head_dim,))
    return shapes


def full_shapes(layer: MLAGeometry) -> list[tuple[int, ...]]:
    """Shape of every parameter of a full layer."""
    d, query, up = (
        layer.hidden_size,
        layer.num_attention_heads * layer.head_dim,
        layer.num_up_heads * layer.head_dim,
    )
    r_k, r_v, joint = layer.k_lora_rank, layer.v_lora_rank, layer.kv_lora_rank
    latents = [(joint, d), (up, joint), (up, joint)] if joint else [(r_k, d), (r_v, d), (up, r_k), (up, r_v)]
    shapes: list[tuple[int, ...]] = [(query, d), *latents, (d, query)]
    if layer.query_bias:
        shapes.append((query,))
    if layer.key_value_bias or layer.latent_bias:
        shapes += [(up,), (up,)]
    if layer.output_bias:
        shapes.append((d,))
    if layer.key_norm:
        shapes += [(layer.head_dim,), (layer.head_dim,)]
    return shapes


def elements(shapes: list[tuple[int, ...]]) -> int:
    return sum(prod(shape) for shape in shapes)


@st.composite
def sources(draw: st.DrawFn) -> MLAGeometry:
    """A source attention layer with any grouping, biases and norms."""
    key_heads = draw(st.integers(1, 8))
    return MLAGeometry(
        hidden_size=8 * draw(st.integers(1, 32)),
        num_attention_heads=key_heads * draw(st.integers(1, 4)),
        num_key_value_heads=key_heads,
        head_dim=2 * draw(st.integers(1, 64)),
        query_bias=draw(st.booleans()),
        key_value_bias=draw(st.booleans()),
        output_bias=draw(st.booleans()),
        key_norm=draw(st.booleans()),
    )


@st.composite
def decoupled_layers(draw: st.DrawFn) -> MLAGeometry:
    """A decoupled layer of any ranks and head dims."""
    source = draw(sources())
    rope = 2 * draw(st.integers(0, source.head_dim // 2))
    return replace(
        source,
        attention_form="decoupled",
        kv_lora_rank=draw(st.integers(1, 256)),
        q_lora_rank=draw(st.none() | st.integers(1, 256)),
        qk_nope_head_dim=source.head_dim - rope,
        qk_rope_head_dim=rope,
        num_rope_heads=draw(st.sampled_from((1, source.num_key_value_heads))),
        v_head_dim=draw(st.integers(1, 128)),
        num_up_heads=draw(st.sampled_from((source.num_key_value_heads, source.num_attention_heads))),
        rope_cache=draw(st.sampled_from(("cached", "rebuilt"))),
        latent_bias=draw(st.booleans()),
        latent_norm=draw(st.booleans()),
    )


@st.composite
def full_layers(draw: st.DrawFn) -> MLAGeometry:
    """A full layer of any two ranks."""
    source = draw(sources())
    return replace(
        source,
        attention_form="full",
        k_lora_rank=draw(st.integers(1, 256)),
        v_lora_rank=draw(st.integers(1, 256)),
        num_up_heads=draw(st.sampled_from((source.num_key_value_heads, source.num_attention_heads))),
        latent_bias=draw(st.booleans()),
    )


@st.composite
def joint_layers(draw: st.DrawFn) -> MLAGeometry:
    """A full layer with one latent."""
    return replace(draw(full_layers()), k_lora_rank=0, v_lora_rank=0, kv_lora_rank=draw(st.integers(1, 256)))


def test_source_by_hand() -> None:
    assert SOURCE.cache_numbers == SOURCE.source_cache_numbers == 64
    assert SOURCE.cache_ratio == 1
    assert SOURCE.cache_bytes() == 128
    assert SOURCE.cache_bytes(bits=4) == 32
    # q 64·64, k and v 32·64 each, o 64·64
    assert SOURCE.parameters == SOURCE.source_parameters == 4096 + 2048 + 2048 + 4096
    assert SOURCE.parameters_added == 0


def test_source_with_biases_and_norms_by_hand() -> None:
    layer = replace(SOURCE, query_bias=True, key_value_bias=True, output_bias=True, key_norm=True)
    assert layer.parameters == 12288 + 64 + 2 * 32 + 64 + 2 * 16
    assert layer.cache_numbers == 64  # the norm is done before the source caches its keys


def test_decoupled_by_hand() -> None:
    assert DECOUPLED.qk_head_dim == 16
    assert DECOUPLED.cached_width(1) == 2 * 4
    assert DECOUPLED.cache_numbers == 20 + 8
    assert DECOUPLED.cache_ratio == 28 / 64
    # q 64·64, down 20·64, rotary key 8·64, up 20·2·(12 + 16), o 64·64
    assert DECOUPLED.parameters == 4096 + 1280 + 512 + 1120 + 4096
    assert DECOUPLED.parameters_added == 11104 - 12288


def test_decoupled_with_query_rank_and_latent_norm_by_hand() -> None:
    layer = replace(DECOUPLED, q_lora_rank=10, latent_norm=True)
    assert layer.parameters == 11104 - 4096 + 10 * 64 + 10 * 64 + 10 + 20
    assert layer.cache_numbers == 28


def test_decoupled_with_biases_and_norms_by_hand() -> None:
    layer = replace(DECOUPLED, query_bias=True, key_value_bias=True, output_bias=True, key_norm=True)
    # q 4·16, latent 20, rotary key 2·4, up 2·(12 + 16), o 64, query gains of 16 dims for 2 rotary heads, and the
    # source's key projection with its bias
    assert layer.parameters == 11104 + 64 + 20 + 8 + 56 + 64 + 2 * 16 + 2 * 16 * (64 + 1)
    assert layer.cache_numbers == 20 + 8 + 2  # and one inverse root mean square per key head
    assert replace(DECOUPLED, latent_bias=True).parameters == 11104 + 56
    assert replace(DECOUPLED, latent_bias=True, rope_cache="rebuilt").parameters == 11104 - 512 + 20 * 8 + 56 + 8


def test_decoupled_rebuilt_by_hand() -> None:
    layer = replace(DECOUPLED, rope_cache="rebuilt")
    assert layer.cache_numbers == 20
    assert layer.parameters == 11104 - 512 + 20 * 8  # the rotary key is made from the latent, not the hidden state


def test_full_by_hand() -> None:
    assert FULL.cache_numbers == 24 + 8
    assert FULL.cache_ratio == 0.5
    # q 64·64, down (24 + 8)·64, up (24 + 8)·4·16, o 64·64
    assert FULL.parameters == 4096 + 2048 + 2048 + 4096
    assert replace(FULL, query_bias=True, key_value_bias=True).parameters == 12288 + 64 + 2 * 64
    joint = replace(FULL, kv_lora_rank=24, k_lora_rank=0, v_lora_rank=0)
    assert joint.cache_numbers == 24
    # q, o, one down-projection 24·64, two ups 24·4·16 and, with a bias, 4·16 for each
    assert joint.parameters == 4096 + 4096 + 24 * 64 + 2 * 24 * 64
    assert replace(joint, latent_bias=True).parameters == joint.parameters + 2 * 64


def test_model_by_hand() -> None:
    model = ModelGeometry((SOURCE, DECOUPLED, FULL))
    assert model.cache_numbers == 64 + 28 + 32
    assert model.source_cache_numbers == 3 * 64
    assert model.cache_ratio == 124 / 192
    assert model.cache_bytes(tokens=10) == 2480
    assert model.cache_bytes(tokens=10, bits=4) == 620
    assert model.parameters_added == 0 - 1184 + 0


@pytest.mark.parametrize("form", ["source", "decoupled"])
def test_from_config_reads_fields_that_are_set(form: str) -> None:
    config = SimpleNamespace(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        attention_form=form,
        kv_lora_rank=20,
        q_lora_rank=None,
        rms_norm_eps=1e-6,
    )
    layer = MLAGeometry.from_config(config, key_norm=True, output_bias=False)
    # A layer that keeps the source's attention has no latent, whatever the config holds for the others.
    rank = 20 if form == "decoupled" else 0
    assert layer == replace(SOURCE, attention_form=form, kv_lora_rank=rank, key_norm=True)


def test_from_config_fills_in_what_older_configs_leave_out() -> None:
    config = SimpleNamespace(hidden_size=64, num_attention_heads=4, num_key_value_heads=None)
    assert MLAGeometry.from_config(config) == replace(SOURCE, num_key_value_heads=4)


@given(sources())
def test_source_parameters_are_the_sum_of_its_weights(layer: MLAGeometry) -> None:
    assert layer.parameters == elements(source_shapes(layer))
    assert layer.parameters_added == 0


@given(decoupled_layers())
def test_decoupled_parameters_are_the_sum_of_its_weights(layer: MLAGeometry) -> None:
    assert layer.parameters == elements(decoupled_shapes(layer))
    assert layer.parameters_added == elements(decoupled_shapes(layer)) - elements(source_shapes(layer))


@given(full_layers() | joint_layers())
def test_full_parameters_are_the_sum_of_its_weights(layer: MLAGeometry) -> None:
    assert layer.parameters == elements(full_shapes(layer))
    assert layer.parameters_added == elements(full_shapes(layer)) - elements(source_shapes(layer))


@given(full_layers())
def test_full_at_the_source_widths_keeps_the_cache(layer: MLAGeometry) -> None:
    width = layer.num_key_value_heads * layer.head_dim
    layer = replace(layer, k_lora_rank=width, v_lora_rank=width)
    assert layer.cache_numbers == layer.source_cache_numbers
    assert layer.cache_ratio == 1


@given(decoupled_layers())
def test_key_norm_adds_a_number_per_key_head(layer: MLAGeometry) -> None:
    with_norm, without = replace(layer, key_norm=True), replace(layer, key_norm=False)
    assert with_norm.cache_numbers - without.cache_numbers == layer.num_key_value_heads
    gains = layer.num_rope_heads * layer.qk_head_dim
    keys = layer.num_key_value_heads * layer.head_dim * (layer.hidden_size + layer.key_value_bias)
    assert with_norm.parameters - without.parameters == gains + keys


@given(full_layers())
def test_key_norm_leaves_the_cache_of_a_full_layer(layer: MLAGeometry) -> None:
    assert replace(layer, key_norm=True).cache_numbers == replace(layer, key_norm=False).cache_numbers


@given(decoupled_layers())
def test_rebuilt_drops_the_rotary_key_from_the_cache(layer: MLAGeometry) -> None:
    layer = replace(layer, latent_bias=False)
    cached, rebuilt = replace(layer, rope_cache="cached"), replace(layer, rope_cache="rebuilt")
    rotary = layer.num_rope_heads * layer.qk_rope_head_dim
    assert cached.cache_numbers - rebuilt.cache_numbers == rotary
    assert cached.parameters - rebuilt.parameters == (layer.hidden_size - layer.kv_lora_rank) * rotary


@given(decoupled_layers() | full_layers() | joint_layers(), st.sampled_from((2, 4, 8, 16, 32)))
def test_bytes_follow_numbers(layer: MLAGeometry, bits: int) -> None:
    assert layer.cache_bytes(bits) * 8 == layer.cache_numbers * bits
    assert layer.cache_bytes() == 2 * layer.cache_numbers
    assert layer.cache_ratio == layer.cache_numbers / layer.source_cache_numbers


@given(st.lists(sources() | decoupled_layers() | full_layers(), min_size=1, max_size=6), st.integers(1, 10_000))
def test_a_model_is_the_sum_of_its_layers(layers: list[MLAGeometry], tokens: int) -> None:
    model = ModelGeometry(tuple(layers))
    assert model.cache_numbers == sum(layer.cache_numbers for layer in layers)
    assert model.source_cache_numbers == sum(layer.source_cache_numbers for layer in layers)
    assert model.parameters_added == sum(layer.parameters_added for layer in layers)
    assert model.cache_bytes(tokens) == pytest.approx(tokens * sum(layer.cache_bytes() for layer in layers))
