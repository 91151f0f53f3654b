"""A family that only looks like one that its spec describes is refused, with what differs, before anything changes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention

from optimum_mla import GQA2MLA, MHA2MLA, AttentionSpec, XEcoMLA, register_family, trace
from optimum_mla.core.errors import UnsupportedModelError
from optimum_mla.families.verify import verify_family
from optimum_mla.models import family_of, family_table
from optimum_mla.pipeline import convert
from tests.cases import FAMILIES, SIZES, source_model, token_ids

LLAMA_4_ROPE = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "llama_4_scaling_beta": 0.1,
    "original_max_position_embeddings": 64,
}
LOOK_ALIKES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "gemma2": ("Gemma2", {}, ["soft-capped at 50", "with the gain that the spec says"]),
    "helium": ("Helium", {}, ["rotates neighbouring dims", "interleaved=True"]),
    "cohere": ("Cohere", {}, ["repeat each angle", "interleaved=True, interleaved_table=True"]),
    "smollm3": ("SmolLM3", {}, ["layer 3", "does not rotate queries and keys"]),
    "gemma": ("Gemma", {}, ["with the gain that the spec says"]),
    "gpt_oss": ("GptOss", {"num_local_experts": 4}, ["attention sinks"]),
    "ministral3": ("Ministral3", {"rope_parameters": LLAMA_4_ROPE}, ["from position 100003 on"]),
    "starcoder2": ("Starcoder2", {"use_bias": True}, ["the query projection has a bias"]),
    "phi3": ("Phi3", {}, ["no 'q_proj'"]),
    "olmo2": ("Olmo2", {}, ["no 'input_layernorm.weight'"]),
}
"""`model_type` -> class prefix, config, and words of the message."""


@pytest.fixture
def _registered_for_a_while() -> Iterator[None]:
    before = dict(family_table.FAMILIES)
    yield
    family_table.FAMILIES.clear()
    family_table.FAMILIES.update(before)


def look_alike(model_type: str, prefix: str, changes: dict[str, Any]) -> PreTrainedModel:
    """A random model of a family that is registered under default names; SmolLM3's fourth layer has no positions."""
    register_family(AttentionSpec(model_type=model_type, class_prefix=prefix))
    config = getattr(transformers, f"{prefix}Config")(**{**SIZES, "num_hidden_layers": 5, **changes})
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


@pytest.mark.usefixtures("_registered_for_a_while")
@pytest.mark.parametrize("model_type", LOOK_ALIKES)
def test_look_alikes_are_refused_and_stay_as_they_were(model_type: str, tmp_path: Any) -> None:
    prefix, changes, words = LOOK_ALIKES[model_type]
    model = look_alike(model_type, prefix, changes)
    ids = token_ids(1, 12)
    before = model(ids, use_cache=False).logits
    for method in (GQA2MLA(), MHA2MLA(kv_cache_ratio=0.5, rope_selection="high"), XEcoMLA(kv_cache_ratio=0.5)):
        with pytest.raises(UnsupportedModelError) as caught:
            method(model)
        for word in words:
            assert caught.match(word)
    assert type(model).__name__ == f"{prefix}ForCausalLM"
    assert torch.equal(model(ids, use_cache=False).logits, before)
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(UnsupportedModelError, match=words[0]):
        convert(str(tmp_path / "source"), tmp_path / "out", options={"kv_cache_ratio": 1.0})
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.usefixtures("_registered_for_a_while")
def test_a_look_alike_is_not_traced() -> None:
    model = look_alike("helium", "Helium", {})
    with pytest.raises(UnsupportedModelError, match="neighbouring dims"):
        trace(model)


@pytest.mark.usefixtures("_registered_for_a_while")
def test_an_embedding_multiplier_is_told() -> None:
    model = look_alike("granite", "Granite", {"embedding_multiplier": 12.0})
    with pytest.raises(UnsupportedModelError, match="multiplied by about 12"):
        GQA2MLA()(model)


@pytest.mark.usefixtures("_registered_for_a_while")
def test_scaled_logits_are_told() -> None:
    as_llama = {"embedding_multiplier": 1.0, "attention_multiplier": 0.25, "residual_multiplier": 1.0}
    model = look_alike("granite", "Granite", {**as_llama, "logits_scaling": 8.0})
    with pytest.raises(UnsupportedModelError, match=r"logits of this granite model .* factors and the cap"):
        GQA2MLA()(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_built_in_families_are_what_their_specs_say(family: str, dtype: torch.dtype) -> None:
    model = source_model(family, dtype).train()
    model.model.layers[1].eval()
    verify_family(model, family_of(model.config).spec, range(3))
    assert model.training
    assert not model.model.layers[1].training
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["reference_model", "multi_head_model", "qwen3_model"])
def test_the_embedded_models_are_what_their_specs_say(name: str, attention: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(f"benchmarks/{name}", attn_implementation=attention)
    verify_family(model, family_of(model.config).spec, range(6))


def without_positions(self: Any, hidden_states: Tensor, position_embeddings: Any, *args: Any, **kwargs: Any) -> Any:
    still = torch.ones_like(position_embeddings[0]), torch.zeros_like(position_embeddings[1])
    return LlamaAttention.forward(self, hidden_states, still, *args, **kwargs)


class Squashed(torch.nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


def louder(self: Any, *args: Any, **kwargs: Any) -> Any:
    output, weights = LlamaAttention.forward(self, *args, **kwargs)
    return 1.01 * output, weights


@pytest.mark.parametrize("change", ["bias", "norm", "positions", "output"])
def test_one_changed_layer_is_found(change: str) -> None:
    model = source_model("llama")
    layer = model.model.layers[1]
    if change == "bias":
        layer.self_attn.k_proj.bias = torch.nn.Parameter(torch.zeros(32))
    elif change == "norm":
        layer.input_layernorm = Squashed(64)
    elif change == "positions":
        layer.self_attn.__class__ = type("Still", (type(layer.self_attn),), {"forward": without_positions})
    else:
        layer.self_attn.__class__ = type("Louder", (type(layer.self_attn),), {"forward": louder})
    words = {
        "bias": "the key projection has a bias",
        "norm": "neither an RMSNorm",
        "positions": "does not rotate",
        "output": "another output than",
    }
    with pytest.raises(UnsupportedModelError, match=f"layer 1 .*{words[change]}"):
        GQA2MLA()(model)


def test_classes_that_transformers_does_not_have_are_named() -> None:
    for model_type, prefix in (("llama", "Lama"), ("lama", "Llama")):
        with pytest.raises(UnsupportedModelError, match="class_prefix"):
            register_family(AttentionSpec(model_type=model_type, class_prefix=prefix, query_bias=True))
