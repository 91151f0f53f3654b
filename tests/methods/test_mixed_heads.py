"""GQA2MLA's decoupled form: exact where nothing is dropped, and what calibration buys on the trained model."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from optimum_mla import GQA2MLA, MHA2MLA, XEcoMLA
from optimum_mla.calibrate.text import token_windows
from optimum_mla.convert import Run
from optimum_mla.core.errors import CalibrationDataError, InvalidValueError
from optimum_mla.measure.memory import bytes_per_token
from optimum_mla.measure.quality import perplexity
from tests.cases import FAMILIES, SIZES, source_model, token_ids

REFERENCE = Path(__file__).resolve().parents[2] / "benchmarks" / "reference_model"
HEAD = SIZES["head_dim"]
IDS = token_ids(8, 24)


@torch.no_grad()
def difference(first: torch.nn.Module, second: torch.nn.Module) -> float:
    ids = token_ids()
    return float((first(ids).logits.double() - second(ids).logits.double()).abs().max())


def largest_rank(model: PreTrainedModel, rope_cache: str, rope_dim: int) -> int:
    width = 2 * model.config.num_key_value_heads * HEAD
    return min(model.config.hidden_size, width - (rope_dim if rope_cache == "cached" else 0))


def stopped_component(model: PreTrainedModel, factor: float) -> PreTrainedModel:
    """`model` with the queries of its slowest pair scaled, so that the damage of stopping it is known to be small."""
    for layer in model.model.layers:
        target = layer.self_attn.q_norm.weight if hasattr(layer.self_attn, "q_norm") else layer.self_attn.q_proj.weight
        with torch.no_grad():
            rows = target if target.ndim == 1 else target.view(-1, HEAD, target.shape[-1]).transpose(0, 1)
            rows[[HEAD // 2 - 1, HEAD - 1]] *= factor
            if layer.self_attn.q_proj.bias is not None and target.ndim == 2:
                layer.self_attn.q_proj.bias.view(-1, HEAD)[:, [HEAD // 2 - 1, HEAD - 1]] *= factor
    return model


@pytest.mark.parametrize("rope_cache", ["cached", "rebuilt"])
@pytest.mark.parametrize("family", FAMILIES)
def test_is_the_source_where_the_stopped_component_is_not_read(family: str, rope_cache: str) -> None:
    source = stopped_component(source_model(family, torch.float64), 1e-5)
    rope_dim = source.config.num_key_value_heads * HEAD - 2
    rank = largest_rank(source, rope_cache, rope_dim)
    converted = GQA2MLA(
        kv_lora_rank=rank, qk_rope_head_dim=rope_dim, rope_cache=rope_cache, calibration=IDS, heal=False
    )(source, copy=True)
    assert difference(converted, source) <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_full_with_one_latent_is_the_source_at_full_rank(family: str) -> None:
    source = source_model(family, torch.float64)
    for options in ({"factorization": "joint"}, {"calibration": IDS, "positional": "full"}):
        transformation = GQA2MLA(kv_cache_ratio=1.0, heal=False, **options)
        assert transformation.preserves_computation
        converted = transformation(source, copy=True)
        assert difference(converted, source) <= 1e-5
        assert {layer.k_lora_rank for layer in converted.geometry.layers} == {0}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", [{"rope_cache": "rebuilt"}, {"rope_cache": "cached"}, {"positional": "full"}])
def test_cache_parameters_and_decoding(family: str, form: dict[str, str]) -> None:
    source = source_model(family)
    before, source_bytes = source.num_parameters(), bytes_per_token(source, token_ids(1, 6)).live
    converted = GQA2MLA(kv_cache_ratio=0.75, calibration=IDS, **form)(source)
    live = bytes_per_token(converted, token_ids(1, 6)).live
    assert live == converted.geometry.cache_bytes(bits=32)
    # No rank above the hidden size changes anything, which is half of what the multi-head model caches.
    widest = (
        1.0
        if "rope_cache" in form and form["rope_cache"] == "cached"
        else SIZES["hidden_size"] / (2 * HEAD * source.config.num_key_value_heads)
    )
    assert live == min(0.75, widest) * source_bytes
    assert converted.num_parameters() - before == converted.geometry.parameters_added
    ids = token_ids(2, 7)
    with torch.no_grad():
        whole = converted(ids).logits
        first = converted(ids[:, :4], use_cache=True)
        rest = converted(ids[:, 4:], past_key_values=first.past_key_values).logits
    assert (torch.cat([first.logits, rest], dim=1) - whole).abs().max() <= 1e-4


def test_allocations_share_one_budget() -> None:
    source = source_model("llama")
    ranks = {}
    for allocation in ("uniform", "energy", "error"):
        converted = GQA2MLA(kv_cache_ratio=0.5, calibration=IDS, rank_allocation=allocation)(source, copy=True)
        assert converted.geometry.cache_ratio == 0.5
        ranks[allocation] = [layer.kv_lora_rank for layer in converted.geometry.layers]
    assert len(set(ranks["uniform"])) == 1
    assert len(set(ranks["error"])) > 1
    assert GQA2MLA(calibration=IDS, kv_cache_ratio=0.5).rank_allocation == "error"
    assert GQA2MLA(calibration=IDS, kv_cache_ratio=0.5, rope_cache="cached").rank_allocation == "uniform"


def test_energy_gives_each_layer_its_rank() -> None:
    transformation = GQA2MLA(energy=0.9, calibration=IDS)
    converted = transformation(source_model("llama"))
    ranks = [layer.kv_lora_rank for layer in converted.geometry.layers]
    assert all(1 <= rank < 64 for rank in ranks)
    more = GQA2MLA(energy=0.99, calibration=IDS)(source_model("llama"))
    assert all(a < b.kv_lora_rank for a, b in zip(ranks, more.geometry.layers, strict=True))


def test_dead_channels_and_heads_nobody_reads_are_damped() -> None:
    source = source_model("llama", torch.float64)
    with torch.no_grad():
        for layer in source.model.layers:
            layer.input_layernorm.weight[:5] = 0.0  # channels that are always zero: a singular Gram matrix
            layer.self_attn.q_proj.weight[:32] = 0.0  # the first key head's queries
            layer.self_attn.o_proj.weight[:, 32:] = 0.0  # the second key head's values
    for transformation in (
        GQA2MLA(kv_cache_ratio=0.5, calibration=IDS),
        GQA2MLA(kv_cache_ratio=0.5, calibration=IDS, positional="full"),
        MHA2MLA(kv_cache_ratio=0.5, calibration=IDS),
        XEcoMLA(kv_cache_ratio=0.5, calibration=IDS),
    ):
        converted = transformation(source, copy=True)
        assert converted(token_ids()).logits.isfinite().all()


def test_a_model_that_overflows_on_the_text_is_named() -> None:
    source = source_model("llama")
    with torch.no_grad():
        source.model.layers[0].mlp.down_proj.weight.mul_(1e38)
        source.model.layers[0].mlp.up_proj.weight.mul_(1e38)
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    with pytest.raises(CalibrationDataError, match="not finite"):
        GQA2MLA(kv_cache_ratio=0.5, calibration=IDS)(source)
    assert all(torch.equal(tensor, before[name]) for name, tensor in source.state_dict().items())


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"positional": "decoupled"}, "positional"),
        ({"positional": "half"}, "positional"),
        ({"heal": True}, "heal"),
        ({"factorization": "calibrated"}, "factorization"),
        ({"factorization": "svd"}, "factorization"),
        ({"rank_allocation": "error"}, "rank_allocation"),
        ({"rank_allocation": "some", "calibration": IDS}, "rank_allocation"),
        ({"rope_cache": "rebuilt"}, "rope_cache"),
        ({"rope_cache": "kept", "calibration": IDS}, "rope_cache"),
        ({"qk_rope_head_dim": 8}, "qk_rope_head_dim"),
    ],
)
def test_options_that_do_not_go_together(options: dict, field: str) -> None:
    with pytest.raises(InvalidValueError) as caught:
        GQA2MLA(kv_cache_ratio=0.5, **options)
    assert caught.value.field == field


@pytest.mark.parametrize("rope_dim", [3, 0, 32, -2])
def test_rotary_dims_out_of_range(rope_dim: int) -> None:
    with pytest.raises(InvalidValueError, match="2 to 30"):
        GQA2MLA(kv_cache_ratio=0.5, qk_rope_head_dim=rope_dim, calibration=IDS)(source_model("llama"))


def test_a_cache_too_small_for_the_rotary_key() -> None:
    with pytest.raises(InvalidValueError) as caught:
        GQA2MLA(kv_cache_ratio=0.25, qk_rope_head_dim=16, rope_cache="cached", calibration=IDS)(source_model("llama"))
    assert caught.value.field == "kv_cache_ratio"


@pytest.fixture(scope="module")
def trained() -> tuple[PreTrainedModel, torch.Tensor, torch.Tensor]:
    """The reference model, calibration windows, evaluation windows."""
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    model = AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32).eval()
    calibration = token_windows(tokenizer, REFERENCE / "calibration.txt", 128, 32)
    return model, calibration, token_windows(tokenizer, REFERENCE / "evaluation.txt", 256, 16)


@pytest.mark.slow
def test_calibration_beats_the_papers_forms_on_the_trained_model(
    trained: tuple[PreTrainedModel, torch.Tensor, torch.Tensor],
) -> None:
    model, calibration, evaluation = trained
    before = perplexity(model, evaluation)

    def excess(transformation: GQA2MLA | MHA2MLA | XEcoMLA) -> float:
        return math.log(perplexity(transformation(model, copy=True), evaluation) / before)

    # Well above what was measured (see benchmarks/results/quality.json), well below what the papers' forms leave.
    for options in ({}, {"positional": "full"}):
        assert excess(GQA2MLA(kv_cache_ratio=0.5, calibration=calibration, **options)) < 0.03
        assert excess(GQA2MLA(kv_cache_ratio=0.25, calibration=calibration, **options)) < 0.10
    assert excess(GQA2MLA(kv_cache_ratio=0.25)) > 0.4
    for method in (MHA2MLA, XEcoMLA):
        plain, calibrated = method(kv_cache_ratio=0.5), method(kv_cache_ratio=0.5, calibration=calibration)
        assert excess(calibrated) < 0.6 * excess(plain)


@pytest.mark.slow
def test_healing_helps_on_text_that_it_has_not_seen(
    trained: tuple[PreTrainedModel, torch.Tensor, torch.Tensor],
) -> None:
    model, calibration, evaluation = trained
    perplexities = {}
    for heal in (False, True):
        transformation = GQA2MLA(kv_cache_ratio=0.25, calibration=calibration, rank_allocation="uniform", heal=heal)
        run = Run(transformation, copy.deepcopy(model))
        perplexities[heal] = perplexity(run.convert(), evaluation)
        for result in run.results.values():
            assert result.state_error is not None
            assert (result.healed_error is None) is not heal
            if result.healed_error is not None:
                assert result.healed_error <= result.state_error
    assert perplexities[True] < perplexities[False]
