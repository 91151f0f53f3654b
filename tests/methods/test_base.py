"""What every method does with a model: the matrix of cases, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from optimum.fx.optimization import Transformation

from optimum_mla import GQA2MLA, MHA2MLA, XEcoMLA, compose
from optimum_mla.convert import Run
from optimum_mla.core.errors import CorruptWeightsError, InvalidValueError, UnsupportedModelError
from optimum_mla.measure.memory import bytes_per_token
from tests.cases import FAMILIES, METHODS, SIZES, source_model, token_ids


@pytest.mark.compat
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_converts_every_family(family: str, method: str) -> None:
    source, ids = source_model(family), token_ids()
    before = {name: parameter.clone() for name, parameter in source.state_dict().items()}
    transformation = METHODS[method](ids)
    converted = transformation(source, copy=True)

    assert isinstance(transformation, Transformation)
    assert type(converted).__name__ == f"{FAMILIES[family][0]}MLAForCausalLM"
    assert type(source).__name__ == f"{FAMILIES[family][0]}ForCausalLM"
    assert all(torch.equal(before[name], parameter) for name, parameter in source.state_dict().items())
    assert converted.num_parameters() - source.num_parameters() == converted.geometry.parameters_added
    probe = ids[:1, :4]
    assert bytes_per_token(converted, probe).live == converted.geometry.cache_bytes(bits=32)
    with torch.no_grad():
        logits = converted(ids).logits
    assert logits.isfinite().all()
    generated = converted.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, converted.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", ["mha2mla contribution", "x-ecomla norm, energy"])
def test_dtype_is_kept(method: str, dtype: torch.dtype) -> None:
    converted = METHODS[method](token_ids())(source_model("qwen2", dtype))
    assert {parameter.dtype for parameter in converted.parameters()} == {dtype}
    assert converted.config.dtype == dtype
    with torch.no_grad():
        assert converted(token_ids()).logits.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_conversion_is_deterministic(method: str) -> None:
    first, second = (METHODS[method](token_ids())(source_model("llama")).state_dict() for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_in_place_keeps_the_object_and_what_is_not_converted() -> None:
    source = source_model("llama multi-head, tied").train()
    embedding, mlp = source.model.embed_tokens.weight, source.model.layers[1].mlp.up_proj.weight
    source.generation_config.max_new_tokens = 7
    converted = XEcoMLA(layers="0,2")(source)
    assert converted is source
    assert converted.training
    assert converted.model.embed_tokens.weight is embedding
    assert converted.lm_head.weight is embedding
    assert converted.model.layers[1].mlp.up_proj.weight is mlp
    assert converted.generation_config.max_new_tokens == 7
    assert not any(parameter.is_meta for parameter in converted.parameters())
    assert not any(buffer.is_meta for buffer in converted.buffers())


def test_a_copy_of_a_converted_model_is_independent() -> None:
    converted = GQA2MLA(kv_cache_ratio=0.5)(source_model("llama"))
    other = copy.deepcopy(converted)
    assert other.model.layers[0].self_attn.rotary is other.model.rotary_emb
    ids = token_ids()
    with torch.no_grad():
        assert torch.equal(other(ids).logits, converted(ids).logits)


def test_layers_can_be_converted_in_turns() -> None:
    ids = token_ids()
    at_once = compose(GQA2MLA(layers="0"), MHA2MLA(kv_cache_ratio=0.5, layers="1-2"))(source_model("qwen3"))
    in_turns = MHA2MLA(kv_cache_ratio=0.5, layers=[1, 2])(GQA2MLA(layers=[0])(source_model("qwen3")))
    with torch.no_grad():
        assert torch.equal(at_once(ids).logits, in_turns(ids).logits)
    assert at_once.geometry == in_turns.geometry


def test_a_converted_layer_is_refused() -> None:
    converted = GQA2MLA(layers="1")(source_model("llama"))
    with pytest.raises(InvalidValueError, match="layers: got 1"):
        MHA2MLA()(converted)
    assert [g.attention_form for g in converted.geometry.layers] == ["source", "full", "source"]


@pytest.mark.parametrize(
    ("transformation", "words"),
    [
        (GQA2MLA(kv_lora_rank=65), "kv_lora_rank: got 65, allowed: 2 to 64"),
        (MHA2MLA(kv_lora_rank=61), "kv_lora_rank: got 61, allowed: 1 to 60"),
        (MHA2MLA(kv_cache_ratio=0.05), "allowed: 0.07812 to 1"),
        (MHA2MLA(factorization="split", kv_lora_rank=1), "2 to 56"),
        (XEcoMLA(kv_cache_ratio=0.1), "allowed: 0.1406 to 1"),
        (XEcoMLA(qk_rope_head_dim=7), "even integers from 2 to 14"),
        (XEcoMLA(qk_rope_head_dim=6, rope_selection="last"), "divisors of 16"),
        (XEcoMLA(q_lora_rank=65), "1 to 64"),
        (GQA2MLA(layers="3"), "0 to 2"),
    ],
)
def test_out_of_range_names_the_range_and_changes_nothing(transformation: GQA2MLA, words: str) -> None:
    source = source_model("llama")
    with pytest.raises(InvalidValueError, match=words):
        transformation(source)
    assert type(source).__name__ == "LlamaForCausalLM"
    with pytest.raises(InvalidValueError, match=words):
        transformation.check(source.config)


def test_corrupt_weights_are_named_and_the_model_stays() -> None:
    source = source_model("qwen2")
    with torch.no_grad():
        source.model.layers[2].self_attn.v_proj.bias[3] = torch.inf
    with pytest.raises(CorruptWeightsError, match=r"layers\.2\.self_attn\.v_proj\.bias"):
        GQA2MLA()(source)
    assert type(source).__name__ == "Qwen2ForCausalLM"


def test_weights_beyond_the_dtype_are_refused() -> None:
    source = source_model("llama with yarn", torch.float16)
    with torch.no_grad():
        source.model.layers[0].self_attn.q_proj.weight.fill_(60000.0)
    # Queries of position-free dims take over YaRN's squared attention factor, here 1.14.
    with pytest.raises(CorruptWeightsError, match=r"q_proj\.weight left the range of torch\.float16"):
        MHA2MLA()(source)
    assert type(source).__name__ == "LlamaForCausalLM"


def test_what_is_no_source_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="Linear"):
        GQA2MLA()(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM"):
        GQA2MLA()(source_model("llama").model)
    quantized = source_model("llama")
    quantized.config.quantization_config = {"quant_method": "hqq"}
    with pytest.raises(UnsupportedModelError, match="quantized"):
        GQA2MLA()(quantized)
    with torch.device("meta"):
        empty = type(quantized)(source_model("llama").config)
    with pytest.raises(UnsupportedModelError, match="meta"):
        GQA2MLA()(empty)


def test_output_error_is_zero_at_full_rank_and_grows_below() -> None:
    errors = []
    for ratio in (1.0, 0.75, 0.5, 0.25):
        run = Run(GQA2MLA(kv_cache_ratio=ratio), source_model("llama"))
        run.convert()
        errors.append([result.output_error for result in run.results.values()])
    assert max(errors[0]) < 1e-5
    for layer in range(SIZES["num_hidden_layers"]):
        by_ratio = [row[layer] for row in errors]
        assert by_ratio == sorted(by_ratio)
