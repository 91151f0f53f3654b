"""Several methods as one."""

from __future__ import annotations

import pytest
from optimum.fx.optimization import Transformation

from optimum_mla import GQA2MLA, MHA2MLA, XEcoMLA, compose
from optimum_mla.core.errors import InvalidValueError
from tests.cases import source_model


def test_a_hybrid_of_three_methods() -> None:
    parts = GQA2MLA(layers="0"), MHA2MLA(kv_cache_ratio=0.5, layers="1"), XEcoMLA(kv_lora_rank=10, layers="2")
    composed = compose(*parts)
    assert isinstance(composed, Transformation)
    assert not composed.preserves_computation
    converted = composed(source_model("qwen2"))
    assert [layer.mla_method for layer in converted.config.per_layer_config] == ["gqa2mla", "mha2mla", "x-ecomla"]
    assert [g.cache_numbers for g in converted.geometry.layers] == [64, 32, 18]
    assert compose(GQA2MLA(layers="0"), GQA2MLA(layers="1")).preserves_computation


def test_options_of_one_part_do_not_leak_into_another() -> None:
    first = XEcoMLA(kv_lora_rank=20, latent_norm=True, q_lora_rank=30, layers="0-1")
    converted = compose(first, MHA2MLA(kv_cache_ratio=0.5, layers="2"))(source_model("llama"))
    last = converted.geometry.layers[2]
    assert (last.latent_norm, last.q_lora_rank, last.num_rope_heads) == (False, None, 2)


def test_overlap_is_refused_before_anything_changes() -> None:
    source = source_model("llama")
    with pytest.raises(InvalidValueError, match=r"\[1\]"):
        compose(GQA2MLA(layers="0-1"), MHA2MLA(layers="1-2"))(source)
    assert type(source).__name__ == "LlamaForCausalLM"


def test_copy_leaves_the_source() -> None:
    source = source_model("llama")
    converted = compose(GQA2MLA(layers="0"), MHA2MLA(layers="1"))(source, copy=True)
    assert type(source).__name__ == "LlamaForCausalLM"
    assert type(converted).__name__ == "LlamaMLAForCausalLM"
