"""One result by both paths, through every way of feeding a model, in every form of the attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from optimum_mla import GQA2MLA, models
from optimum_mla.measure.memory import live_cache_bytes
from optimum_mla.nn import LatentAttention
from tests.cases import SIZES, source_model, token_ids

DECOUPLED = {
    "attention_form": "decoupled",
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 4,
    "v_head_dim": 16,
    "num_up_heads": 2,
}
FORMS: dict[str, dict[str, Any]] = {
    "shared rotary key": DECOUPLED,
    "rotary key per head": {**DECOUPLED, "num_rope_heads": 2},
    "own up-projection per query head": {**DECOUPLED, "num_up_heads": 4},
    "norms and query latent": {**DECOUPLED, "latent_norm": True, "q_lora_rank": 24},
    "rotary key rebuilt": {**DECOUPLED, "rope_cache": "rebuilt"},
    "full rope": {"attention_form": "full", "k_lora_rank": 20, "v_lora_rank": 12, "v_head_dim": 16, "num_up_heads": 4},
    "hybrid": {**DECOUPLED, "per_layer_config": {1: {"attention_form": "source"}, 2: {"kv_lora_rank": 8}}},
}
FAMILIES = {"Llama": {}, "Qwen2": {}, "Qwen3": {"attention_bias": True}, "Mistral": {"sliding_window": 9}}
LENGTH = 20


def build(family: str, form: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A converted model with random weights."""
    config = getattr(models, f"{family}MLAConfig")(**{**SIZES, **FAMILIES[family], **FORMS[form]})
    model = getattr(models, f"{family}MLAForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)


def latent_attentions(model: torch.nn.Module) -> list[LatentAttention]:
    return [module for module in model.modules() if isinstance(module, LatentAttention)]


@contextmanager
def forced(model: torch.nn.Module, absorb: bool) -> Iterator[None]:
    """Make every layer take one path wherever it may choose."""
    attentions = latent_attentions(model)
    for attention in attentions:
        attention._absorbing_saves = lambda queries, tokens: absorb  # type: ignore[method-assign]
    try:
        yield
    finally:
        for attention in attentions:
            del attention._absorbing_saves


def padded_batch() -> tuple[Tensor, Tensor, Tensor]:
    """Two rows, the first left-padded by four: ids, mask, position ids as `generate` makes them."""
    ids = token_ids(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return ids, mask, (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)


@torch.no_grad()
def in_chunks(model: PreTrainedModel, bounds: list[int], cache: DynamicCache) -> Tensor:
    """Logits of the padded batch, fed to the cache in pieces that end at `bounds`."""
    ids, mask, positions = padded_batch()
    pieces = zip([0, *bounds], bounds, strict=False)
    logits = [
        model(
            ids[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, start:end],
            past_key_values=cache,
        ).logits
        for start, end in pieces
    ]
    return torch.cat(logits, dim=1)


@pytest.mark.compat
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_both_paths_and_all_ways_of_feeding_agree(family: str, form: str) -> None:
    model = build(family, form)
    ids, mask, positions = padded_batch()
    real = mask.bool()
    with torch.no_grad(), forced(model, absorb=False):
        expected = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[real]
    assert expected.abs().max() > 0.5
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        for absorb in (False, True):
            with forced(model, absorb):
                for bounds in ([LENGTH], [8, 15, LENGTH], [12, *range(13, LENGTH + 1)]):
                    cache = DynamicCache(config=model.config)
                    logits = in_chunks(model, bounds, cache)[real]
                    assert (logits - expected).abs().max() <= 1e-4, (implementation, absorb, bounds)


@pytest.mark.compat
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_live_cache_bytes_are_the_geometry_figure(family: str, form: str) -> None:
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        model = build(family, form, dtype)
        cache = DynamicCache(config=model.config)
        in_chunks(model, [7, 8, LENGTH], cache)
        assert live_cache_bytes(cache) == 2 * LENGTH * model.geometry.cache_numbers * size


@pytest.mark.parametrize("form", FORMS)
def test_parameters_are_the_geometry_figure(form: str) -> None:
    for family in FAMILIES:
        model = build(family, form)
        for attention in latent_attentions(model):
            assert sum(p.numel() for p in attention.parameters()) == attention.geometry.parameters


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_paths_differ_by_rounding_only(form: str) -> None:
    exact = build("Qwen3", form)
    with torch.no_grad():
        for parameter in exact.parameters():
            parameter.copy_(parameter.bfloat16())
    reference = in_chunks(exact, [LENGTH], DynamicCache(config=exact.config))
    rounded = exact.to(torch.bfloat16)
    errors = []
    for absorb in (False, True):
        with forced(rounded, absorb):
            logits = in_chunks(rounded, [12, *range(13, LENGTH + 1)], DynamicCache(config=exact.config))
        real = padded_batch()[1].bool()
        errors.append(((logits.float() - reference)[real].norm() / reference[real].norm()).item())
    assert max(errors) < 0.03  # three layers of 8-bit mantissas
    assert max(errors) < 2.5 * min(errors)


@pytest.mark.compat
@pytest.mark.parametrize("form", FORMS)
def test_generate_gives_the_same_tokens_with_every_cache(form: str) -> None:
    model = build("Llama", form)
    ids, mask, _ = padded_batch()
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False}
    expected = model.generate(ids, use_cache=False, **options)
    assert torch.equal(model.generate(ids, **options), expected)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)
    beams = {**options, "num_beams": 3}
    assert torch.equal(model.generate(ids, **beams), model.generate(ids, use_cache=False, **beams))
    looked_up = model.generate(ids[1:], max_new_tokens=10, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(looked_up, model.generate(ids[1:], max_new_tokens=10, do_sample=False))


@pytest.mark.parametrize("form", FORMS)
def test_gradients_do_not_depend_on_the_path(form: str) -> None:
    model = build("Qwen3", form, torch.float32).train()
    model.set_attn_implementation("eager")
    ids = token_ids()
    gradients = []
    for absorb in (False, True):
        model.zero_grad()
        with forced(model, absorb):
            model(ids, labels=ids).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == dict(model.named_parameters()).keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-5, rtol=1e-3), name
        # Under softmax, a bias of position-free keys only shifts all logits of a query: no other gradient may vanish.
        assert gradient.abs().max() > 0, name


@pytest.mark.compat
@pytest.mark.parametrize("form", FORMS)
def test_gradient_checkpointing_changes_nothing(form: str) -> None:
    model = build("Llama", form).train()
    ids = token_ids()
    model(ids, labels=ids).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(ids, labels=ids).loss.backward()
    assert all(torch.allclose(p.grad, plain[name], atol=1e-6) for name, p in model.named_parameters())


@pytest.mark.compat
@pytest.mark.parametrize("form", FORMS)
def test_attentions_of_every_layer_are_recorded(form: str) -> None:
    model = build("Llama", form)
    model.set_attn_implementation("eager")
    ids = token_ids()
    outputs = model(ids, output_attentions=True, output_hidden_states=True)
    assert len(outputs.attentions) == SIZES["num_hidden_layers"]
    assert len(outputs.hidden_states) == SIZES["num_hidden_layers"] + 1
    for weights in outputs.attentions:
        assert weights.shape == (*ids.shape[:1], 4, ids.shape[1], ids.shape[1])
        assert torch.allclose(weights.sum(-1), torch.ones(weights.shape[:-1]), atol=1e-5)
        assert (weights.triu(1) == 0).all()


def test_decoding_absorbs_by_itself() -> None:
    model = build("Llama", "shared rotary key")
    attention = latent_attentions(model)[0]
    assert attention._absorbing_saves(1, 500)
    assert not attention._absorbing_saves(500, 500)


@pytest.mark.compat
def test_an_adapter_on_the_up_projection_acts_in_decoding() -> None:
    model = build("Llama", "shared rotary key")
    ids, mask, positions = padded_batch()
    plain = model(ids, attention_mask=mask, position_ids=positions).logits
    adapted = get_peft_model(model, LoraConfig(target_modules=["kv_b_proj"], r=2, init_lora_weights=False)).eval()
    with torch.no_grad(), forced(adapted, absorb=True):
        whole = adapted(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        decoded = in_chunks(adapted, [12, *range(13, LENGTH + 1)], DynamicCache(config=model.config))
    real = mask.bool()
    assert (whole - plain)[real].abs().max() > 1e-2
    assert (whole - decoded)[real].abs().max() <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_flex_attention_prefills_with_the_same_logits(form: str) -> None:
    model = build("Llama", form)
    ids, mask, positions = padded_batch()
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, position_ids=positions).logits
        model.set_attn_implementation("flex_attention")
        logits = model(ids, attention_mask=mask, position_ids=positions).logits
    assert (logits - expected)[mask.bool()].abs().max() <= 1e-4


@pytest.mark.parametrize("positional", ["full", "decoupled"])
def test_attention_functions_get_the_numbers_of_a_token_side_by_side(
    positional: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's fast kernels take no others, and the slow one takes many times as long for a long prompt."""
    ids = token_ids(4, 24)
    model = GQA2MLA(kv_cache_ratio=0.5, positional=positional, calibration=ids)(source_model("llama"))
    found: list[int] = []
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def watched(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        found.extend(tensor.stride(-1) for tensor in (query, key, value))
        return sdpa(module, query, key, value, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", watched)
    with torch.no_grad():
        model(ids)
    assert found == [1] * (3 * 3)
