"""Families x methods x forms: exact at full rank, the stated bytes, saved, loaded, generating, trained a step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.result import ROOT, save_result
from optimum_mla import GQA2MLA, MLATransformation, trace
from optimum_mla.cache.codec_layer import CodecLayer, ExactTokens
from optimum_mla.convert.codec import fit_codec
from optimum_mla.core.errors import UnsupportedModelError
from optimum_mla.export.deepseek import export_deepseek
from optimum_mla.families.built_in import BUILT_IN
from optimum_mla.families.spec import full_layers, sliding_window
from optimum_mla.families.verify import verify_family
from optimum_mla.measure.verify import reference_logits, verify
from optimum_mla.models import family_of
from optimum_mla.models.coded import with_codec
from optimum_mla.nn import LatentAttention
from optimum_mla.stack import cache_argument, rope_type
from tests.cases import FAMILIES, FURTHER_FAMILIES, METHODS, source_model, token_ids

FORMS: dict[str, Callable[[Tensor], MLATransformation]] = {
    **METHODS,
}
QUICK = ("mha2mla calibrated", "gqa2mla one latent", "gqa2mla rebuilt")
"""The forms that each run of the suite has every family in; the slow test runs all forms of all families."""
ERRORS = {
    "gqa2mla rebuilt": 0.5,
    "gqa2mla one latent": 0.5,
}
"""The largest relative error of the logits of a random model that a form may leave; that of an empty cache is 1."""

ALL = FAMILIES | FURTHER_FAMILIES
RESULTS = ROOT / "benchmarks" / "results" / "families.json"
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
        attentions = [converted.get_submodule(family_of(converted.config).spec.attention_path(n)) for n in range(3)]
        latent = [n for n, attention in enumerate(attentions) if isinstance(attention, LatentAttention)]
        assert latent == full_layers(converted.config)
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


def check_form(family: str, form: str, folder: Path) -> None:
    """Convert a model, save it, load it, verify its caches and its generation, and take the gradients of a step."""
    ids = token_ids(4, 24)
    with torch.no_grad():
        expected = source_model(family)(ids).logits
        model = converted_model(family, form, ids)
        logits = model(ids).logits
        assert float((logits - expected).norm() / expected.norm()) < ERRORS.get(form, 2.0)

        model.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.allclose(loaded(ids).logits, logits, atol=1e-6)
        # Bytes of the live caches, logits through them, and generation with and without a cache.
        verify(loaded, reference_logits(model))

    model.train()
    loss = model(ids, labels=ids).loss
    loss.backward()
    with_gradient = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert any("kv_a_proj" in name or "k_a_proj" in name for name in with_gradient)


@pytest.mark.parametrize("form", QUICK)
@pytest.mark.parametrize("family", FURTHER_FAMILIES)
def test_forms_of_families(family: str, form: str, tmp_path: Path) -> None:
    check_form(family, form, tmp_path)


@pytest.mark.parametrize("family", ALL)
def test_every_family_has_codes(family: str) -> None:
    """The model stays its source, and tokens that are read from codes are nearly those of the source."""
    model, ids = source_model(family).eval(), token_ids(8, 40)
    config = model.config
    if sliding_window(config, full_layers(config)[0]) is not None:
        with pytest.raises(UnsupportedModelError, match="all of its layers have a sliding window"):
            fit_codec(model, ids)
        return
    if rope_type(config) == "longrope":
        with pytest.raises(UnsupportedModelError, match=r"depend on the length \(longrope\)"):
            fit_codec(model, ids)
        return
    codec = fit_codec(model, ids, 0.5, exact=ExactTokens(sinks=2, recent=4, together=4))
    with torch.no_grad():
        expected = model(ids[:2], use_cache=False).logits
        with_codec(model, codec)
        assert torch.equal(model(ids[:2], use_cache=False).logits, expected)
        cache = model.make_cache()
        parts = [model(part, **cache_argument(model, cache), use_cache=True).logits for part in ids[:2].split(8, dim=1)]
    assert [layer for layer, held in enumerate(cache.layers) if isinstance(held, CodecLayer)] == full_layers(config)
    assert torch.equal(parts[0], model(ids[:2, :8], use_cache=False).logits)
    through = torch.cat(parts, dim=1)
    assert 1e-6 < float((through - expected).norm() / expected.norm()) < 0.2


RECORDS: dict[str, dict[str, object]] = {}
"""What the slow test found, by family."""


@pytest.fixture(scope="module", autouse=True)
def _recorded() -> Iterator[None]:
    """Write the results of the page on families after a run of the slow test on all of them."""
    yield
    if RECORDS.keys() == ALL.keys():
        save_result(RESULTS, {"forms": list(FORMS)}, families=RECORDS)


def exactness(family: str, dtype: torch.dtype) -> float | None:
    """The largest difference of the logits of a full-rank conversion, or None where a layer has no such dtype."""
    if dtype == torch.float64 and ALL[family][1].keys() & EXPERT_FIELDS:
        return None
    model, ids = source_model(family, dtype), token_ids()
    with torch.no_grad():
        expected = model(ids).logits
        return float((GQA2MLA()(model)(ids).logits - expected).abs().max())


def why_not_exported(family: str) -> str | None:
    """Why a family has no export, or None where its export computes the same."""
    try:
        method = GQA2MLA(kv_cache_ratio=0.5, rope_cache="cached", shared_rope=True, calibration=token_ids(4, 24))
        converted = method(source_model(family))
        exported = export_deepseek(converted)
    except UnsupportedModelError as error:
        return str(error).removeprefix("export: ").split(". ")[0]
    verify(exported, reference_logits(converted))
    return None


@pytest.mark.slow
@pytest.mark.parametrize("family", ALL)
def test_a_family_whole(family: str, tmp_path: Path) -> None:
    model_type = source_model(family).config.model_type
    for form in FORMS:
        check_form(family, form, tmp_path / form)
    single, double = exactness(family, torch.float32), exactness(family, torch.float64)
    assert single is not None
    assert single <= 1e-4
    RECORDS[family] = {
        "model_type": model_type,
        "about": next(about for about, spec in BUILT_IN.items() if spec.model_type == model_type),
        "float32": single,
        "float64": double,
        "forms": len(FORMS),
        "no_export": why_not_exported(family),
    }
