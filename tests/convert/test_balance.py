"""Balancing changes the size of weights and latents, and nothing that is computed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from optimum_mla import GQA2MLA, MHA2MLA, XEcoMLA
from optimum_mla.calibrate.text import token_windows
from optimum_mla.convert.balance import balanced
from optimum_mla.core.geometry import MLAGeometry
from optimum_mla.export.latent_norm import with_latent_norms
from optimum_mla.nn import LatentAttention
from optimum_mla.nn.projections import UP_PROJECTIONS
from optimum_mla.recovery import mla_lora_config
from tests.cases import METHODS, source_model, token_ids

SHAPE = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
SMALL = {"kv_lora_rank": 6, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "num_up_heads": 2}
GEOMETRIES = {
    "rebuilt": MLAGeometry(**SHAPE, **SMALL, attention_form="decoupled", rope_cache="rebuilt"),
    "cached, biases": MLAGeometry(**SHAPE, **SMALL, attention_form="decoupled", query_bias=True, key_value_bias=True),
    "query latent": MLAGeometry(**SHAPE, **SMALL, attention_form="decoupled", q_lora_rank=5),
    "norms": MLAGeometry(**SHAPE, **SMALL, attention_form="decoupled", q_lora_rank=5, latent_norm=True),
    "one latent": MLAGeometry(**SHAPE, attention_form="full", kv_lora_rank=6, num_up_heads=4),
    "two latents": MLAGeometry(**SHAPE, attention_form="full", k_lora_rank=6, v_lora_rank=4, num_up_heads=4),
}
GAIN = torch.linspace(0.2, 3.0, 32)
REFERENCE = Path(__file__).resolve().parents[2] / "benchmarks" / "reference_model"


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
    if g.q_lora_rank is not None:
        made |= linear("q_a_proj", 7.0, g.q_lora_rank, 32)
    if g.latent_norm:
        made |= {"kv_a_layernorm.weight": torch.full((6,), 300.0), "q_a_layernorm.weight": torch.full((5,), 80.0)}
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
    gain = tensors.get("kv_a_layernorm.weight", torch.ones(6))[:, None]
    found = {"kv": tensors["kv_b_proj.weight"] @ (gain * down[:6])}
    keys = tensors["k_rope_proj.weight"] @ down[:6] if g.rope_cache == "rebuilt" else down[6:]
    if g.q_lora_rank is None:
        queries = affine("q_proj").unflatten(0, (4, -1))
    else:
        gain = tensors.get("q_a_layernorm.weight", torch.ones(g.q_lora_rank))[:, None]
        queries = (tensors["q_b_proj.weight"] @ (gain * tensors["q_a_proj.weight"])).unflatten(0, (4, -1))
    found["queries without position"] = queries[:, :8]
    found["rotary logits"] = torch.einsum("hri,rj->hij", queries[:, 8:], keys)
    return found


@pytest.mark.parametrize("name", GEOMETRIES)
def test_nothing_that_is_computed_changes_by_a_bit(name: str) -> None:
    geometry = GEOMETRIES[name]
    before = weights(geometry)
    kept = {key: tensor.clone() for key, tensor in before.items()}
    after = balanced(before, geometry, GAIN)
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
def test_latents_are_as_large_as_the_inputs(name: str) -> None:
    geometry = GEOMETRIES[name]
    after = balanced(weights(geometry), geometry, GAIN)

    def size(tensor: Tensor) -> float:
        return tensor.square().mean().sqrt().item()

    inputs = GAIN * torch.randn(4096, 32, generator=torch.Generator().manual_seed(1))
    downs = {"full": ["kv_a_proj", "k_a_proj", "v_a_proj"], "decoupled": ["kv_a_proj_with_mqa", "q_a_proj"]}
    for down in downs[geometry.attention_form]:
        if f"{down}.weight" not in after:
            continue
        norm = after.get(f"{down.replace('_proj_with_mqa', '').replace('_proj', '')}_layernorm.weight")
        latents = inputs @ after[f"{down}.weight"][: geometry.kv_lora_rank or None].T
        if norm is not None:
            latents = nn.functional.rms_norm(latents, latents.shape[-1:], norm)
        assert 0.65 <= size(latents) / size(inputs) <= 1.5, down
    if geometry.attention_form == "decoupled":
        queries = after["q_proj.weight" if geometry.q_lora_rank is None else "q_b_proj.weight"]
        rebuilt = geometry.rope_cache == "rebuilt"
        keys = after["k_rope_proj.weight"] if rebuilt else after["kv_a_proj_with_mqa.weight"][6:]
        assert 0.45 <= size(keys) / size(queries.unflatten(0, (4, -1))[:, 8:]) <= 2.2


def test_zeros_stay_as_they_are() -> None:
    geometry = GEOMETRIES["rebuilt"]
    dead = weights(geometry)
    dead["kv_a_proj_with_mqa.weight"].zero_()
    assert torch.equal(balanced(dead, geometry, GAIN)["kv_b_proj.weight"], dead["kv_b_proj.weight"])
    tensors = weights(geometry)
    assert torch.equal(balanced(tensors, geometry, 0 * GAIN)["kv_b_proj.weight"], tensors["kv_b_proj.weight"])


def input_sizes(model: PreTrainedModel, ids: Tensor) -> dict[str, float]:
    """Root mean square of what goes into each attention and each up-projection, without the first tokens."""
    found = {}

    def note(name: str, value: Tensor) -> None:
        found[name] = value[:, 4:].square().mean().sqrt().item()

    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, LatentAttention):
            hooks.append(
                module.register_forward_pre_hook(
                    lambda _, args, kwargs, name=name: note(name, kwargs["hidden_states"]), with_kwargs=True
                )
            )
        elif name.rpartition(".")[2] in UP_PROJECTIONS:
            hooks.append(module.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0])))
    with torch.no_grad():
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def check_sizes(model: PreTrainedModel, ids: Tensor, largest: float) -> None:
    """Latents are about as large as the inputs."""
    found = input_sizes(model, ids)
    latents = [name for name in found if name.rpartition(".")[2] in UP_PROJECTIONS]
    assert latents
    for name in latents:
        ratio = found[name] / found[name.rpartition(".")[0]]
        assert 1 / 2 <= ratio <= largest, (name, ratio)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_latents_as_large_as_the_inputs(method: str, family: str) -> None:
    model = METHODS[method](token_ids(8, 24))(source_model(family))
    check_sizes(model, token_ids(4, 24), 3.0)


def moved(model: PreTrainedModel, ids: Tensor, config: Any) -> float:
    """How far one step of a small rate in all adapters moves the predictions: the root of the mean divergence."""
    before = model(ids, use_cache=False).logits.log_softmax(-1)
    torch.manual_seed(0)
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.copy_(1e-3 * torch.randn_like(parameter).sign())
    after = adapted(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    kl = nn.functional.kl_div(after, before, reduction="sum", log_target=True).item()
    return math.sqrt(kl / ids.numel())


TRAINED: dict[str, Any] = {
    "gqa2mla": lambda ids: GQA2MLA(kv_cache_ratio=0.25, calibration=ids),
    "gqa2mla, norm": lambda ids: GQA2MLA(kv_cache_ratio=0.5, rope_cache="cached", latent_norm=True, calibration=ids),
    "gqa2mla, full": lambda ids: GQA2MLA(kv_cache_ratio=0.5, positional="full", calibration=ids),
    "mha2mla": lambda ids: MHA2MLA(kv_cache_ratio=0.5),
    "x-ecomla": lambda ids: XEcoMLA(kv_cache_ratio=0.5),
}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_learning_rate_means_about_the_same_in_every_form_of_a_trained_model() -> None:
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    ids = token_windows(tokenizer, REFERENCE / "calibration.txt", 64, 8)

    def source() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32).eval()

    config = LoraConfig(r=32, lora_alpha=64, target_modules=["k_proj", "v_proj"], task_type="CAUSAL_LM")
    wanted = moved(source(), ids, config)
    for name, make in TRAINED.items():
        model = make(ids)(source())
        check_sizes(model, ids, 5.0)
        assert moved(model, ids, mla_lora_config(model)) <= 5 * wanted, name
    # The norms that an export adds keep the scale.
    cached = GQA2MLA(kv_cache_ratio=0.5, rope_cache="cached", shared_rope="regular", calibration=ids)(source())
    check_sizes(with_latent_norms(cached, ids).model, ids, 5.0)
