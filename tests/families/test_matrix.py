"""Families x methods x forms: exact at full rank, the stated bytes, saved, loaded, generating, trained a step."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_mla import GQA2MLA, MLATransformation, trace
from optimum_mla.families.spec import full_layers
from optimum_mla.families.verify import verify_family
from optimum_mla.measure.verify import reference_logits, verify
from optimum_mla.models import family_of
from optimum_mla.nn import LatentAttention
from tests.cases import FURTHER_FAMILIES, METHODS, source_model, token_ids

FORMS: dict[str, Callable[[Tensor], MLATransformation]] = {
    **METHODS,
    "coded, one latent": lambda ids: GQA2MLA(kv_cache_budget=0.25, positional="full", calibration=ids),
    "coded, rebuilt": lambda ids: GQA2MLA(kv_cache_budget=0.25, positional="decoupled", calibration=ids),
}
QUICK = ("mha2mla calibrated", "coded, one latent", "coded, rebuilt")
"""Run on every family in each run of the suite; `slow` runs all."""
ERRORS = {"gqa2mla rebuilt": 0.5, "gqa2mla one latent": 0.5, "coded, one latent": 0.25, "coded, rebuilt": 0.25}
"""The largest relative error of the logits of a random model that a form may leave; that of an empty cache is 1."""

EXPERT_FIELDS = {"num_experts", "num_local_experts"}
"""Where a config has one of these: PyTorch multiplies the states of experts in at most 32 bits."""


def converted_model(family: str, form: str, ids: Tensor) -> PreTrainedModel:
    """A model of a family whose layers with full attention are converted."""
    model = source_model(family)
    method = FORMS[form](ids)
    method.layers = full_layers(model.config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Some forms are run without calibration, as the papers have them.
        return method(model)


@pytest.mark.parametrize("family", FURTHER_FAMILIES)
def test_specs_are_true_and_full_rank_is_exact(family: str) -> None:
    model, ids = source_model(family), token_ids()
    verify_family(model, family_of(model.config).spec, range(3))
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(trace(model)(ids), expected)
        assert (GQA2MLA()(trace(model))(ids) - expected).abs().max() <= 1e-4
        converted = GQA2MLA()(model)
        assert all(isinstance(m, LatentAttention) for n, m in converted.named_modules() if n.endswith("attn"))
        assert (converted(ids).logits - expected).abs().max() <= 1e-4


@pytest.mark.parametrize(
    "family", [name for name, (_, own) in FURTHER_FAMILIES.items() if not own.keys() & EXPERT_FIELDS]
)
def test_full_rank_is_exact_in_float64(family: str) -> None:
    model, ids = source_model(family, torch.float64), token_ids()
    with torch.no_grad():
        expected = model(ids).logits
        # Norms and tables of Transformers compute in float32 inside models of any dtype.
        assert (GQA2MLA()(model)(ids).logits - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("family", "form"),
    [
        pytest.param(family, form, marks=() if form in QUICK else pytest.mark.slow)
        for family in FURTHER_FAMILIES
        for form in FORMS
    ],
)
def test_every_form_of_every_family(family: str, form: str, tmp_path: Path) -> None:
    ids = token_ids(4, 24)
    with torch.no_grad():
        expected = source_model(family)(ids).logits
        model = converted_model(family, form, ids)
        logits = model(ids).logits
        assert float((logits - expected).norm() / expected.norm()) < ERRORS.get(form, 2.0)

        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.allclose(loaded(ids).logits, logits, atol=1e-6)
        # Bytes of the live caches, logits through them, and generation with and without a cache.
        verify(loaded, reference_logits(model))

    model.train()
    loss = model(ids, labels=ids).loss
    loss.backward()
    with_gradient = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert any("kv_a_proj" in name or "k_a_proj" in name for name in with_gradient)
