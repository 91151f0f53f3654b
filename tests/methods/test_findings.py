"""A conversion, refused or finished, changes nothing that it does not convert."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, PreTrainedModel

from optimum_mla import GQA2MLA, MHA2MLA, MLATransformation, XEcoMLA, compose
from optimum_mla.convert import Run
from optimum_mla.core.errors import InvalidValueError, MLAError, UnsupportedModelError
from tests.cases import source_model, token_ids


def test_what_was_frozen_stays_frozen() -> None:
    model = source_model("llama").requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    GQA2MLA(layers="0")(model)
    assert not model.model.embed_tokens.weight.requires_grad
    assert not model.model.layers[1].self_attn.q_proj.weight.requires_grad
    assert model.model.norm.weight.requires_grad


def test_an_adapter_is_refused_and_stays_in_the_model() -> None:
    model, ids = source_model("llama"), token_ids()
    adapted = get_peft_model(model, LoraConfig(target_modules=["k_proj"], init_lora_weights=False)).eval()
    with torch.no_grad():
        expected = model(ids).logits
        named = r"layers\.0\.self_attn\.k_proj .*but peft\.tuners\.lora\.layer\.Linear\. Merge adapters"
        with pytest.raises(UnsupportedModelError, match=named):
            GQA2MLA()(model)
        assert torch.equal(model(ids).logits, expected)
        with adapted.disable_adapter():
            assert (model(ids).logits - expected).abs().max() > 1e-2


def test_a_merged_adapter_is_converted_with_the_model() -> None:
    model, ids = source_model("llama"), token_ids()
    adapted = get_peft_model(model, LoraConfig(target_modules=["k_proj"], init_lora_weights=False)).eval()
    with torch.no_grad():
        expected = adapted(ids).logits
        converted = GQA2MLA()(adapted.merge_and_unload())
        assert (converted(ids).logits - expected).abs().max() <= 1e-4


@pytest.mark.parametrize(
    "composed",
    [
        compose(GQA2MLA(layers="0"), MHA2MLA(kv_lora_rank=500, layers="1")),
        compose(compose(GQA2MLA(layers="0")), MHA2MLA(layers="0-1")),
    ],
    ids=["rank of the second part", "overlap of a nested part"],
)
def test_a_refused_composition_changes_nothing(composed: MLATransformation) -> None:
    source = source_model("llama")
    with pytest.raises(InvalidValueError):
        composed(source)
    assert type(source).__name__ == "LlamaForCausalLM"


def test_the_output_error_of_a_model_in_training_is_free_of_dropout() -> None:
    source = source_model("llama", attention_dropout=0.5).train()
    run, state = Run(GQA2MLA(), source), torch.random.get_rng_state()
    run.convert()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(result.output_error < 1e-5 for result in run.results.values())


def test_the_output_error_of_silent_attention_is_a_number() -> None:
    source = source_model("llama")
    with torch.no_grad():
        source.model.layers[1].self_attn.v_proj.weight.zero_()
    run = Run(GQA2MLA(), source)
    run.convert()
    assert all(math.isfinite(result.output_error) for result in run.results.values())


@pytest.mark.parametrize("ids", [token_ids() + 200, token_ids()[0]], ids=["beyond the vocabulary", "one dimension"])
def test_unsuitable_calibration_tokens_are_named_and_the_mode_stays(ids: torch.Tensor) -> None:
    source = source_model("llama").train()
    with pytest.raises(MLAError):
        MHA2MLA(calibration=ids)(source)
    assert source.training


@pytest.mark.parametrize(
    ("transformation", "converted_first"),
    [
        (XEcoMLA(energy=0.5, qk_rope_head_dim=7), False),
        (XEcoMLA(q_energy=0.5, kv_lora_rank=9999), False),
        (MHA2MLA(), True),
    ],
    ids=["rotary dim beside energy", "rank beside query energy", "converted layer"],
)
def test_check_needs_no_weights_to_refuse(transformation: MLATransformation, converted_first: bool) -> None:
    source = source_model("llama")
    if converted_first:
        GQA2MLA(layers="1")(source)
    with pytest.raises(InvalidValueError):
        transformation.check(source.config)


@pytest.mark.parametrize("options", [{"kv_lora_rank": 16.0}, {"layers": ["1"]}])
def test_wrong_types_are_named(options: dict[str, object]) -> None:
    with pytest.raises(InvalidValueError, match=next(iter(options))):
        GQA2MLA(**options)(source_model("llama"))


@torch.no_grad()
def last_logits(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, cached: bool) -> torch.Tensor:
    """Logits of the last token, fed at once or after a prefill of the others."""
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    if not cached:
        return model(ids, attention_mask=mask, position_ids=positions).logits[:, -1]
    cache = DynamicCache(config=model.config)
    model(ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions[:, :-1], past_key_values=cache)
    return model(ids[:, -1:], attention_mask=mask, position_ids=positions[:, -1:], past_key_values=cache).logits[:, -1]


def test_a_masked_token_inside_a_row_does_not_shift_cached_positions() -> None:
    """Rows of a right-padded batch, and of a second turn after rows that ended early, have such gaps."""
    source, ids = source_model("llama"), token_ids(2, 20)
    mask = torch.ones_like(ids)
    mask[0, 8:11] = 0
    expected = last_logits(source, ids, mask, cached=False)
    assert (last_logits(source, ids, mask, cached=True) - expected).abs().max() <= 1e-4
    converted = GQA2MLA()(source)
    assert (last_logits(converted, ids, mask, cached=False) - expected).abs().max() <= 1e-4
    assert (last_logits(converted, ids, mask, cached=True) - expected).abs().max() <= 1e-4
