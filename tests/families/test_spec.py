"""What a spec reads from a source model, and a family and a method that are not built in."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from optimum_mla import (
    GQA2MLA,
    AttentionSpec,
    MLAGeometry,
    MLATransformation,
    register_family,
    register_transform,
    trace,
)
from optimum_mla.calibrate.layer import LayerCalibration
from optimum_mla.core.errors import InvalidValueError
from optimum_mla.families.project import source_attention
from optimum_mla.families.spec import sliding_window
from optimum_mla.methods.registry import transform_class
from optimum_mla.models import SourceAttention, family_of
from tests.cases import FAMILIES, SIZES, source_model, token_ids


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_those_of_the_modules(family: str) -> None:
    model = source_model(family)
    attention, spec = model.model.layers[1].self_attn, family_of(model.config).spec
    geometry = spec.geometry(model.config)
    assert geometry.query_bias == (attention.q_proj.bias is not None)
    assert geometry.key_value_bias == (attention.k_proj.bias is not None) == (attention.v_proj.bias is not None)
    assert geometry.output_bias == (attention.o_proj.bias is not None)
    assert geometry.key_norm == hasattr(attention, "k_norm")
    assert geometry.source_parameters == sum(p.numel() for p in attention.parameters())
    assert model.get_submodule(spec.attention_path(1)) is attention


def test_weights_come_by_heads_in_float64() -> None:
    model = source_model("qwen3 with biases", torch.bfloat16)
    attention, spec = model.model.layers[0].self_attn, family_of(model.config).spec
    source = source_attention(spec, model.model.layers[0], model.config, 0, model.model.rotary_emb)
    for mine, linear, heads in (
        (source.query, attention.q_proj.weight, 4),
        (source.key, attention.k_proj.weight, 2),
        (source.value, attention.v_proj.weight, 2),
    ):
        assert mine.dtype == torch.float64
        assert mine.shape == (heads, 16, 64)
        assert all(torch.equal(mine[h], linear[16 * h : 16 * (h + 1)].double()) for h in range(heads))
    assert torch.equal(source.key_bias.flatten(), attention.k_proj.bias.double())
    assert torch.equal(source.key_gain, attention.k_norm.weight.double()[None])
    assert torch.equal(source.query_gain, attention.q_norm.weight.double()[None])
    assert source.output().keys() == {"o_proj.weight", "o_proj.bias"}


def test_bias_fields_of_a_config_are_read() -> None:
    spec = AttentionSpec("x", "X", query_bias="attention_bias", key_value_bias=True, output_bias="no_such_field")
    features = spec.features(SimpleNamespace(attention_bias=True))
    assert features.items() >= {"query_bias": True, "key_value_bias": True, "output_bias": False}.items()
    assert (features["key_norm"], features["joint_norms"], features["logit_cap"]) == (False, False, None)
    assert spec.features(SimpleNamespace(attention_bias=False))["query_bias"] is False


def test_window_of_each_layer() -> None:
    by_layer = SimpleNamespace(layer_types=["full_attention", "sliding_attention"], sliding_window=5)
    assert [sliding_window(by_layer, layer) for layer in range(2)] == [None, 5]
    assert sliding_window(SimpleNamespace(sliding_window=7), 0) == 7
    assert sliding_window(SimpleNamespace(), 0) is None


def test_a_family_of_ones_own_converts_saves_and_loads(tmp_path: object) -> None:
    family = register_family(AttentionSpec(model_type="cwm", class_prefix="Cwm"))
    config = transformers.CwmConfig(**SIZES, layer_types=["full_attention"] * 3)
    assert family_of(config) is family
    model = transformers.CwmForCausalLM(config).eval()
    ids = token_ids()
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(trace(model)(ids), expected)
        converted = GQA2MLA()(model)
        assert (converted(ids).logits - expected).abs().max() <= 1e-4
        converted.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(loaded) is family.model
        assert torch.allclose(loaded(ids).logits, converted(ids).logits, atol=1e-6)


def test_registering_a_family_again_keeps_its_models_usable() -> None:
    source = source_model("llama")
    half = GQA2MLA(layers="0")(source, copy=True)
    register_family(family_of(half.config).spec)
    whole = GQA2MLA(layers="1-2")(half)
    with torch.no_grad():
        assert (whole(token_ids()).logits - source(token_ids()).logits).abs().max() <= 1e-4


class SharedUpProjection(MLATransformation):
    """Full rank with one up-projected head per key head: nothing is replicated."""

    name = "shared-up"

    def plan_layer(self, source: SourceAttention) -> MLAGeometry:
        g = source.geometry
        if g.key_norm:
            raise InvalidValueError("model", "key norms", "models without them")
        rank = g.num_key_value_heads * g.head_dim
        shape = {"k_lora_rank": rank, "v_lora_rank": rank, "num_up_heads": g.num_key_value_heads}
        return replace(g, attention_form="full", qk_rope_head_dim=g.head_dim, v_head_dim=g.head_dim, **shape)

    def convert_layer(
        self, source: SourceAttention, geometry: MLAGeometry, calibration: LayerCalibration | None
    ) -> dict[str, Tensor]:
        up = torch.eye(geometry.k_lora_rank, dtype=torch.float64)
        return {
            "q_proj.weight": source.query.flatten(0, 1),
            "k_a_proj.weight": source.key.flatten(0, 1),
            "v_a_proj.weight": source.value.flatten(0, 1),
            "k_b_proj.weight": up,
            "v_b_proj.weight": up.clone(),
            **source.output(),
        }


def test_a_method_of_ones_own_runs_by_its_name() -> None:
    register_transform("shared-up", f"{__name__}:SharedUpProjection")
    method = transform_class("shared-up")
    source = source_model("mistral with a window")
    converted = method()(source, copy=True)
    with torch.no_grad():
        assert (converted(token_ids()).logits - source(token_ids()).logits).abs().max() <= 1e-4
    assert [layer.mla_method for layer in converted.config.per_layer_config] == ["shared-up"] * 3
    with pytest.raises(InvalidValueError, match="key norms"):
        method()(source_model("qwen3"))
    with pytest.raises(InvalidValueError, match="Did you mean shared-up"):
        transform_class("shard-up")
