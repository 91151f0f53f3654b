"""One layer's cache: against Transformers' dynamic layer, and what quantization may change and what not."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from optimum_mla.cache import CacheSettings, LatentCache, LatentLayer
from optimum_mla.cache.blocks import BlockView
from optimum_mla.cache.stored import SPARE_TOKENS, balanced_group
from optimum_mla.core.errors import InvalidValueError
from optimum_mla.core.geometry import MLAGeometry
from optimum_mla.measure.memory import live_cache_bytes

SHAPE: dict[str, int] = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
DECOUPLED: dict[str, Any] = {
    **SHAPE,
    "attention_form": "decoupled",
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 4,
}
FULL: dict[str, Any] = {**SHAPE, "attention_form": "full"}
GEOMETRIES = {
    "shared rotary key": MLAGeometry(**DECOUPLED),
    "rotary keys and key norms": MLAGeometry(**DECOUPLED, num_rope_heads=2, key_norm=True),
    "rotary key rebuilt": MLAGeometry(**DECOUPLED, rope_cache="rebuilt"),
    "rebuilt, key norms": MLAGeometry(**DECOUPLED, rope_cache="rebuilt", key_norm=True),
    "two latents": MLAGeometry(**FULL, k_lora_rank=20, v_lora_rank=12),
    "one latent": MLAGeometry(**FULL, kv_lora_rank=24),
}
BLOCK = 8
every_geometry = pytest.mark.parametrize("name", GEOMETRIES)


def widths(geometry: MLAGeometry) -> tuple[int, int]:
    first = geometry.kv_lora_rank or geometry.k_lora_rank
    return first, geometry.cache_numbers - first


def new_tokens(
    geometry: MLAGeometry, batch: int, tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """The two tensors that a layer caches, [B, 1, S, ·]."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(batch, 1, tokens, w, generator=generator).to(dtype) for w in widths(geometry))
    return first, second


def make_layer(geometry: MLAGeometry, block: int = BLOCK, **settings: Any) -> LatentLayer:
    """A layer of short blocks, so that tests reach several of them."""
    layer = LatentLayer(geometry, CacheSettings(**settings))
    layer.block_tokens = block
    return layer


def dense(layer: LatentLayer) -> tuple[Tensor, Tensor]:
    """What the layer holds, decoded: [B, T, ·] each."""
    view = BlockView([*layer.blocks, *([layer.residual] if layer.residual else [])])
    block = view.whole()
    assert view.tokens == layer.get_seq_length()
    return block.first.dense(), torch.cat([block.second.dense(), block.key_factors], dim=-1)


def window(layer: LatentLayer) -> int:
    return layer.residual.tokens if layer.residual else 0


def assert_owns_its_memory(layer: LatentLayer) -> None:
    for tensor in layer.tensors:
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


operations = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.integers(1, 30)),
        st.tuples(st.just("update"), st.integers(1, 3)),
        st.tuples(st.just("crop"), st.integers(0, 40)),
        st.tuples(st.just("reorder"), st.integers(0, 99)),
        st.tuples(st.just("select"), st.integers(0, 99)),
        st.tuples(st.just("repeat"), st.integers(1, 3)),
        st.tuples(st.just("reset"), st.just(0)),
    ),
    min_size=1,
    max_size=14,
)


@given(name=st.sampled_from(list(GEOMETRIES)), steps=operations, residual_length=st.sampled_from([0, 1, 4, 11, 128]))
def test_unquantized_it_is_a_dynamic_layer(name: str, steps: list[tuple[str, int]], residual_length: int) -> None:
    geometry = GEOMETRIES[name]
    layer, plain, batch = make_layer(geometry, residual_length=residual_length), DynamicLayer(), 2
    for number, (step, amount) in enumerate(steps):
        if step == "update":
            tokens = new_tokens(geometry, batch, amount, seed=number)
            for got, expected in zip(layer.update(*tokens), plain.update(*tokens), strict=True):
                assert isinstance(got, Tensor)
                assert torch.equal(got, expected)
        elif step == "crop":
            layer.crop(-amount)
            plain.crop(-amount)
        elif step == "reset":
            layer.reset()
            plain.reset()
        elif plain.get_seq_length():
            generator = torch.Generator().manual_seed(amount)
            if step == "repeat":
                amount = amount if batch * amount <= 6 else 1
                layer.batch_repeat_interleave(amount)
                plain.batch_repeat_interleave(amount)
                batch *= amount
            else:
                count = batch if step == "reorder" else 1 + amount % batch
                rows = torch.randint(batch, (count,), generator=generator)
                for cache in (layer, plain):
                    (cache.reorder_cache if step == "reorder" else cache.batch_select_indices)(rows)
                batch = count
        assert layer.get_seq_length() == plain.get_seq_length()
        assert layer.get_mask_sizes(3) == plain.get_mask_sizes(3)
        assert layer.get_max_length() == plain.get_max_length() == -1
        if plain.get_seq_length():
            first, second = dense(layer)
            assert torch.equal(first, plain.keys[:, 0])
            assert torch.equal(second, plain.values[:, 0])
        assert_owns_its_memory(layer)


@given(
    name=st.sampled_from(list(GEOMETRIES)),
    pieces=st.lists(st.integers(1, 25), min_size=1, max_size=12),
    residual_length=st.sampled_from([0, 4, 8, 13]),
    backend=st.sampled_from(["hqq", "quanto"]),
    bits=st.sampled_from([8, 4, 2]),
    rope_bits=st.sampled_from([8, 16]),
)
def test_codes_are_written_once_and_the_newest_tokens_are_exact(
    name: str, pieces: list[int], residual_length: int, backend: str, bits: int, rope_bits: int
) -> None:
    geometry, tokens = GEOMETRIES[name], sum(pieces)
    options = {"bits": bits, "backend": backend, "residual_length": residual_length, "rope_bits": rope_bits}
    first, second = new_tokens(geometry, 2, tokens)
    layer = make_layer(geometry, **options)
    start, older, stored = 0, None, 0
    for piece in pieces:
        parts = first[:, :, start : start + piece], second[:, :, start : start + piece]
        view = layer.append(*parts)
        start += piece
        assert view.tokens == layer.get_seq_length() == start
        # The new tokens are seen as they came, even where they are quantized at once.
        seen = view.whole()
        assert torch.equal(seen.first.dense()[:, -piece:], parts[0][:, 0])
        held = dense(layer)
        if older is not None:
            for now, before in zip(held, older, strict=True):
                assert torch.equal(now[:, :stored], before[:, :stored])
        exact = window(layer)
        assert exact <= residual_length
        assert exact >= min(start, math.floor(0.75 * residual_length))
        for now, given_tokens in zip(held, (first, second), strict=True):
            assert torch.equal(now[:, start - exact :], given_tokens[:, 0, start - exact : start])
        if start > exact:
            assert not torch.equal(held[0][:, : start - exact], first[:, 0, : start - exact])
        assert all(block.tokens <= BLOCK for block in layer.blocks)
        assert all(block.tokens == BLOCK for block in layer.blocks[:-1])
        assert_owns_its_memory(layer)
        older, stored = held, start - exact
    # Pieces decide when a token is quantized, never to what.
    whole = make_layer(geometry, block=1000, **options)
    whole.append(first, second)
    both = min(tokens - window(layer), tokens - window(whole))
    for got, expected in zip(dense(layer), dense(whole), strict=True):
        assert torch.equal(got[:, :both], expected[:, :both])


@pytest.mark.parametrize("rope_bits", [16, 8])
@pytest.mark.parametrize(("backend", "bits"), [("hqq", 4), ("hqq", 3), ("quanto", 8), ("quanto", 2)])
@every_geometry
def test_a_row_does_not_depend_on_its_batch(name: str, backend: str, bits: int, rope_bits: int) -> None:
    geometry = GEOMETRIES[name]
    options = {"bits": bits, "backend": backend, "residual_length": 4, "rope_bits": rope_bits, "group_size": 8}
    first, second = new_tokens(geometry, 3, 40)
    first = first * torch.tensor([1.0, 1e-2, 50.0]).view(3, 1, 1, 1)

    def fed(rows: slice) -> LatentLayer:
        layer = make_layer(geometry, **options)
        for start, stop in ((0, 17), (17, 18), (18, 40)):
            layer.append(first[rows, :, start:stop], second[rows, :, start:stop])
        return layer

    batch = fed(slice(0, 3))
    for row in range(3):
        alone = fed(slice(row, row + 1))
        for got, expected in zip(dense(batch), dense(alone), strict=True):
            assert torch.equal(got[row : row + 1], expected)
    # The same by picking rows out of the quantized blocks.
    together = dense(batch)
    batch.batch_select_indices(torch.tensor([2, 0]))
    batch.batch_repeat_interleave(2)
    batch.reorder_cache(torch.tensor([3, 0, 1, 1]))
    for got, expected in zip(dense(batch), together, strict=True):
        assert torch.equal(got, expected[[0, 2, 2, 2]])
    assert_owns_its_memory(batch)


def expected_bytes(layer: LatentLayer, batch: int, backend: str, bits: int, rope_bits: int, group_size: int) -> int:
    """Of a 16-bit layer, from the shapes alone."""
    geometry = layer.geometry
    latent, second = widths(geometry)
    scales = geometry.cached_key_factors

    def token_bits(width: int, at: int) -> int:
        if at == 16 or not width:
            return 16 * width
        group = balanced_group(width, group_size)
        groups = math.ceil(width / group)
        codes = 32 * math.ceil(groups * group / 10) if at == 3 else at * groups * group
        return codes + groups * (16 if (backend, at) == ("quanto", 8) else 32)

    second_bits = bits if geometry.attention_form == "full" else rope_bits
    old = token_bits(latent, bits) + token_bits(second - scales, second_bits) + 16 * scales
    exact = window(layer)
    spare = layer.residual.plain.buffer.shape[1] - exact if layer.residual else 0
    assert spare <= SPARE_TOKENS
    return batch * ((exact + spare) * 16 * (latent + second) + (layer.get_seq_length() - exact) * old) // 8


@pytest.mark.parametrize(
    ("backend", "bits", "rope_bits"),
    [
        *product(["hqq", "quanto"], [4, 16], [16]),
        *product(["hqq", "quanto"], [2, 8, 16], [8]),
        ("hqq", 3, 16),
    ],
)
@every_geometry
def test_live_bytes_are_those_of_the_shapes(name: str, backend: str, bits: int, rope_bits: int) -> None:
    geometry = GEOMETRIES[name]
    options = {"bits": bits, "backend": backend, "rope_bits": rope_bits, "group_size": 16}
    layer = make_layer(geometry, residual_length=12, **options)
    cache = LatentCache([layer])
    for number, tokens in enumerate([100, 1, 1, 7, *[1] * 20]):
        layer.append(*new_tokens(geometry, 2, tokens, seed=number, dtype=torch.bfloat16))
        assert live_cache_bytes(cache) == expected_bytes(layer, 2, **options)
        assert_owns_its_memory(layer)
    for remove in (1, 3, 20, 40):
        layer.crop(-remove)
        assert live_cache_bytes(cache) == expected_bytes(layer, 2, **options)
        assert_owns_its_memory(layer)
    layer.crop(-10_000)
    assert layer.get_seq_length() == live_cache_bytes(cache) == 0


@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("backend", ["hqq", "quanto"])
def test_a_long_prompt_takes_its_bits(backend: str, bits: int, group_size: int) -> None:
    geometry = MLAGeometry(**{**DECOUPLED, "kv_lora_rank": 128, "qk_rope_head_dim": 16})
    layer = LatentLayer(geometry, CacheSettings(bits, backend, group_size))
    tokens = 10_000
    layer.append(*new_tokens(geometry, 1, tokens, dtype=torch.bfloat16))
    assert len(layer.blocks) == math.ceil((tokens - window(layer)) / layer.block_tokens) > 1
    rotary_and_window = 2 * 16 * tokens + 2 * 128 * window(layer)
    latents = live_cache_bytes(LatentCache([layer])) - rotary_and_window
    assert latents == pytest.approx(128 * (tokens - window(layer)) * (bits + 32 / group_size) / 8, rel=0.01)
    assert 96 <= window(layer) <= 128


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    remove=st.integers(0, 60),
    more=st.integers(1, 20),
    residual_length=st.sampled_from([0, 4, 12]),
)
def test_cropping_and_going_on(lengths: list[int], remove: int, more: int, residual_length: int) -> None:
    geometry = GEOMETRIES["rotary keys and key norms"]
    layer = make_layer(geometry, bits=4, rope_bits=8, residual_length=residual_length)
    for number, tokens in enumerate(lengths):
        layer.append(*new_tokens(geometry, 2, tokens, seed=number))
    before, kept = dense(layer), max(0, sum(lengths) - remove)
    layer.crop(-remove)
    assert layer.get_seq_length() == kept
    assert_owns_its_memory(layer)
    layer.append(*new_tokens(geometry, 2, more, seed=99))
    after = dense(layer)
    assert layer.get_seq_length() == kept + more
    assert all(block.tokens <= BLOCK for block in layer.blocks)
    quantized = sum(block.tokens for block in layer.blocks)
    for now, old in zip(after, before, strict=True):
        # What the window held may have been quantized since; codes and the scales are as they were.
        still = min(kept, quantized, max(0, sum(lengths) - residual_length))
        assert torch.equal(now[:, :still], old[:, :still])
        assert torch.equal(now[:, :kept, -2:], old[:, :kept, -2:]) or now is after[0]


def test_crop_takes_no_positive_number() -> None:
    layer = make_layer(GEOMETRIES["shared rotary key"])
    layer.append(*new_tokens(layer.geometry, 1, 5))
    with pytest.raises(ValueError, match="crop: got 3"):
        layer.crop(3)
    assert layer.get_seq_length() == 5


@every_geometry
def test_other_widths_are_refused(name: str) -> None:
    geometry = GEOMETRIES[name]
    layer = make_layer(geometry, bits=4)
    first, second = new_tokens(geometry, 1, 3)
    for wrong in ((first[..., :-1], second), (first, torch.cat([second, second[..., :0], first[..., :1]], dim=-1))):
        with pytest.raises(InvalidValueError, match="cache") as caught:
            layer.append(*wrong)
        assert str(list(widths(geometry))) in caught.value.allowed
    assert layer.get_seq_length() == 0


@every_geometry
def test_offloading_leaves_values_as_they_are(name: str) -> None:
    geometry = GEOMETRIES[name]
    layer = make_layer(geometry, bits=4, rope_bits=8, residual_length=8)
    layer.offload()
    layer.prefetch()  # nothing yet
    layer.append(*new_tokens(geometry, 2, 30))
    before = dense(layer)
    layer.offload()
    assert all(torch.equal(now, old) for now, old in zip(dense(layer), before, strict=True))
    layer.prefetch()
    assert all(torch.equal(now, old) for now, old in zip(dense(layer), before, strict=True))
    assert_owns_its_memory(layer)


@pytest.mark.parametrize("backend", ["hqq", "quanto"])
def test_what_is_quantized_and_what_is_not(backend: str) -> None:
    """Latents at `bits`, rotary keys at `rope_bits`, both latents of the full form alike, key-norm factors never."""

    def exact(name: str, **settings: Any) -> tuple[bool, bool, bool]:
        geometry = GEOMETRIES[name]
        layer = make_layer(geometry, backend=backend, residual_length=0, **settings)
        first, second = new_tokens(geometry, 2, 20)
        layer.append(first, second)
        held_first, held_second = dense(layer)
        assert (held_first - first[:, 0]).abs().max() < 0.3
        assert not second.numel() or (held_second - second[:, 0]).abs().max() < 0.3
        scales = second.shape[-1] - geometry.cached_key_factors
        same = held_second == second[:, 0]
        return torch.equal(held_first, first[:, 0]), bool(same[..., :scales].all()), bool(same[..., scales:].all())

    assert exact("rotary keys and key norms", bits=4) == (False, True, True)
    assert exact("rotary keys and key norms", bits=4, rope_bits=8) == (False, False, True)
    assert exact("rotary keys and key norms", rope_bits=8) == (True, False, True)
    assert exact("rebuilt, key norms", bits=4, rope_bits=8) == (False, True, True)
    assert exact("two latents", bits=4) == (False, False, True)
    assert exact("two latents", rope_bits=8) == (True, True, True)
    assert exact("one latent", bits=4) == (False, True, True)


def test_both_update_contracts_see_the_same() -> None:
    """Two dense tensors for whoever asks as Transformers does, a view for our own attention."""
    geometry = GEOMETRIES["rotary keys and key norms"]
    one, other = (make_layer(geometry, bits=4, residual_length=4) for _ in range(2))
    plain, blocks = Cache(layers=[one]), LatentCache([other])
    for number, tokens in enumerate([15, 1, 9]):
        parts = new_tokens(geometry, 2, tokens, seed=number)
        first, second = plain.update(*parts, 0)
        view = blocks.update_blocks(*parts, 0)
        block = view.whole()
        assert torch.equal(first[:, 0], block.first.dense())
        assert torch.equal(second[:, 0], torch.cat([block.second.dense(), block.key_factors], dim=-1))
        assert view.is_dense == (number == 0)
        assert view.sizes == [b.tokens for b in view]
    with pytest.raises(InvalidValueError, match="cache"):
        blocks.update_blocks(*parts, 1)
    with pytest.raises(InvalidValueError, match="cache"):
        LatentCache([DynamicLayer()]).update_blocks(*parts, 0)


@pytest.mark.parametrize("residual_length", [1, 2, 3])
def test_short_windows_keep_three_quarters_too(residual_length: int) -> None:
    geometry = GEOMETRIES["shared rotary key"]
    layer = make_layer(geometry, bits=4, residual_length=residual_length)
    for number in range(12):
        layer.append(*new_tokens(geometry, 1, 1, seed=number))
        assert min(number + 1, 0.75 * residual_length) <= window(layer) <= residual_length
