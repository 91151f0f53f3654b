"""Balancing changes the size of weights, and nothing that is computed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from optimum_mla.convert.balance import balanced
from optimum_mla.core.geometry import MLAGeometry

SHAPE = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
SMALL = {"kv_lora_rank": 6, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "num_up_heads": 2}
GEOMETRIES = {
    "rebuilt": MLAGeometry(**SHAPE, **SMALL, attention_form="decoupled", rope_cache="rebuilt"),
    "cached, biases": MLAGeometry(**SHAPE, **SMALL, attention_form="decoupled", query_bias=True, key_value_bias=True),
    "query latent": MLAGeometry(**SHAPE, **SMALL, attention_form="decoupled", q_lora_rank=5),
    "one latent": MLAGeometry(**SHAPE, attention_form="full", kv_lora_rank=6, num_up_heads=4),
    "two latents": MLAGeometry(**SHAPE, attention_form="full", k_lora_rank=6, v_lora_rank=4, num_up_heads=4),
}


def weights(g: MLAGeometry) -> dict[str, Tensor]:
    """A layer's tensors, down-projections and rotary keys far too large."""
    draw = torch.Generator().manual_seed(0)

    def linear(name: str, size: float, *shape: int, bias: bool = False) -> dict[str, Tensor]:
        made = {f"{name}.weight": size * torch.randn(*shape, generator=draw)}
        return made | ({f"{name}.bias": size * torch.randn(shape[0], generator=draw)} if bias else {})

    heads = g.num_attention_heads * g.qk_head_dim
    if g.attention_form == "full":
        if g.kv_lora_rank:
            ranks = g.kv_lora_rank, g.kv_lora_rank
            made = linear("kv_a_proj", 30.0, g.kv_lora_rank, 32)
        else:
            ranks = g.k_lora_rank, g.v_lora_rank
            made = linear("k_a_proj", 30.0, ranks[0], 32) | linear("v_a_proj", 3.0, ranks[1], 32)
        ups = (linear(f"{side}_b_proj", 0.01, 32, rank) for side, rank in zip("kv", ranks, strict=True))
        return made | next(ups) | next(ups)
    queries = "q_proj" if g.q_lora_rank is None else "q_b_proj"
    made = linear(queries, 0.1, heads, g.q_lora_rank or 32, bias=g.query_bias)
    rope = 0 if g.rope_cache == "rebuilt" else 4
    made |= linear("kv_a_proj_with_mqa", 20.0, 6 + rope, 32, bias=g.key_value_bias)
    made |= linear("kv_b_proj", 0.02, 2 * (8 + g.v_head_dim), 6)
    return made | (linear("k_rope_proj", 50.0, 4, 6) if g.rope_cache == "rebuilt" else {})


def products(tensors: dict[str, Tensor], g: MLAGeometry) -> dict[str, Tensor]:
    """What the layer computes from them: maps from the input to keys and values, and rotary logits."""

    def affine(name: str) -> Tensor:
        weight = tensors[f"{name}.weight"]
        bias = tensors.get(f"{name}.bias")
        return weight if bias is None else torch.cat([weight, bias[:, None]], dim=1)

    if g.attention_form == "full":
        downs = ["kv_a_proj"] * 2 if g.kv_lora_rank else ["k_a_proj", "v_a_proj"]
        return {up: affine(up) @ affine(down) for up, down in zip(("k_b_proj", "v_b_proj"), downs, strict=True)}
    down = affine("kv_a_proj_with_mqa")
    found = {"kv": tensors["kv_b_proj.weight"] @ down[:6]}
    keys = tensors["k_rope_proj.weight"] @ down[:6] if g.rope_cache == "rebuilt" else down[6:]
    queries = affine("q_proj" if g.q_lora_rank is None else "q_b_proj").unflatten(0, (4, -1))
    found["queries without position"] = queries[:, :8]
    found["rotary logits"] = torch.einsum("hri,rj->hij", queries[:, 8:], keys)
    return found


@pytest.mark.parametrize("name", GEOMETRIES)
def test_nothing_that_is_computed_changes_by_a_bit(name: str) -> None:
    geometry = GEOMETRIES[name]
    before = weights(geometry)
    kept = {key: tensor.clone() for key, tensor in before.items()}
    after = balanced(before, geometry)
    assert all(torch.equal(before[key], kept[key]) for key in kept)
    assert before.keys() == after.keys()
    expected = products(before, geometry)
    for key, got in products(after, geometry).items():
        # Powers of two: only sums in which large and small numbers trade places may round otherwise.
        assert (got - expected[key]).abs().max() <= 1e-6 * expected[key].abs().max()
    for key, tensor in after.items():
        ratio = tensor / before[key]
        assert torch.equal(ratio.log2().round().exp2(), ratio)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_both_sides_are_of_like_size(name: str) -> None:
    geometry = GEOMETRIES[name]
    after = balanced(weights(geometry), geometry)

    def size(tensor: Tensor) -> float:
        return tensor.square().mean().sqrt().item()

    if geometry.attention_form == "full":
        down = "kv_a_proj.weight" if geometry.kv_lora_rank else "k_a_proj.weight"
        pairs = [(after[down], after["k_b_proj.weight"])]
    else:
        down = after["kv_a_proj_with_mqa.weight"]
        queries = after["q_proj.weight" if geometry.q_lora_rank is None else "q_b_proj.weight"]
        keys = after["k_rope_proj.weight"] if geometry.rope_cache == "rebuilt" else down[6:]
        pairs = [(down[:6], after["kv_b_proj.weight"]), (keys, queries.unflatten(0, (4, -1))[:, 8:])]
    for one, other in pairs:
        assert 0.45 <= size(one) / size(other) <= 2.2


def test_zeros_and_norms_stay_as_they_are() -> None:
    geometry = GEOMETRIES["rebuilt"]
    dead = weights(geometry)
    dead["kv_b_proj.weight"].zero_()
    assert torch.equal(balanced(dead, geometry)["kv_a_proj_with_mqa.weight"], dead["kv_a_proj_with_mqa.weight"])
    normed = MLAGeometry(**SHAPE, **SMALL, attention_form="decoupled", rope_cache="rebuilt", latent_norm=True)
    tensors = weights(normed)
    assert torch.equal(balanced(tensors, normed)["kv_b_proj.weight"], tensors["kv_b_proj.weight"])
