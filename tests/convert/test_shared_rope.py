"""One rotary key for a whole model."""

from __future__ import annotations

import copy

import pytest
import torch

from optimum_mla import GQA2MLA, MHA2MLA, XEcoMLA
from optimum_mla.convert import Run
from optimum_mla.convert.shared_rope import choose_shared_rope
from optimum_mla.core.errors import InvalidValueError
from tests.cases import source_model, token_ids

CALIBRATION = token_ids(8, 24)


def pairs_of(model: torch.nn.Module) -> list[list[int]]:
    return [layer.self_attn.rope_pairs[0].sort().values.tolist() for layer in model.model.layers]


@pytest.mark.parametrize("rope_dim", [None, 6])
@pytest.mark.parametrize("method", ["gqa2mla", "x-ecomla"])
def test_all_layers_rotate_alike(method: str, rope_dim: int | None) -> None:
    options = {"kv_cache_ratio": 0.75, "calibration": CALIBRATION, "qk_rope_head_dim": rope_dim, "shared_rope": True}
    transformation = GQA2MLA(rope_cache="cached", **options) if method == "gqa2mla" else XEcoMLA(**options)
    model = transformation(source_model("llama"))
    layers = model.geometry.layers
    assert len({(g.kv_lora_rank, g.qk_rope_head_dim) for g in layers}) == 1
    if rope_dim is not None:
        assert layers[0].qk_rope_head_dim == rope_dim
    first, *others = pairs_of(model)
    assert others == [first] * len(others)
    assert model.geometry.cache_ratio <= 0.75
    assert transformation.options["shared_rope"] is True


@torch.no_grad()
def test_the_frequencies_are_those_that_would_change_predictions_most() -> None:
    source = source_model("llama")
    options = {"kv_cache_ratio": 0.75, "rope_cache": "cached", "qk_rope_head_dim": 8, "calibration": CALIBRATION}
    method = GQA2MLA(shared_rope=True, **options)
    run = Run(method, source)
    total = torch.zeros(2, 8, dtype=torch.float64)
    plans = run.plans()
    first = run._first_pass()
    for layer in run.layers:
        tried = first.search(layer)
        damage = method.rotary_damage(tried.source, tried.calibration)
        assert damage.shape == (2, 8)
        assert (damage[0] >= damage[1]).all()
        # What a conversion of this layer alone does to the predictions, from the model itself.
        alone = GQA2MLA(layers=[layer], heal=False, rank_allocation="uniform", **options)(copy.deepcopy(source))
        expected, found = (model(CALIBRATION).logits.log_softmax(-1) for model in (source, alone))
        divergence = float((expected.exp() * (expected - found)).sum(-1).mean())
        total += divergence / tried.squared_error(plans[layer]) * damage
    shared = choose_shared_rope(method, run._first_pass(), plans)
    assert shared.dims == 8
    assert int(shared.counts.sum()) == 4
    kept = torch.stack([total[slot, pair] for pair in range(8) for slot in range(int(shared.counts[pair]))])
    rest = torch.stack([total[slot, pair] for pair in range(8) for slot in range(int(shared.counts[pair]), 2)])
    assert kept.min() >= rest.max()


def test_a_second_model_is_judged_anew() -> None:
    method = XEcoMLA(kv_cache_ratio=0.75, shared_rope=True, calibration=CALIBRATION)
    once, again = (pairs_of(method(source_model(family))) for family in ("llama", "llama"))
    assert once == again


def test_methods_with_a_key_per_head_cannot_share() -> None:
    with pytest.raises(InvalidValueError, match=r"shared_rope: .*rotary key per head"):
        MHA2MLA(kv_cache_ratio=0.5, shared_rope=True)
    with pytest.raises(InvalidValueError, match=r"shared_rope: .*--rope-cache cached"):
        GQA2MLA(kv_cache_ratio=0.5, calibration=CALIBRATION, shared_rope=True)
    with pytest.raises(InvalidValueError, match=r"latent_norm: .*--rope-cache cached"):
        GQA2MLA(kv_cache_ratio=0.5, calibration=CALIBRATION, latent_norm=True)
