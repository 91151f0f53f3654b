"""A model that does not do what it must is not written: each way to be silently wrong is found, by its own line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_mla import GQA2MLA, MHA2MLA, QuantizeLatentCache
from optimum_mla.cache import LatentLayer
from optimum_mla.convert import Run
from optimum_mla.core.errors import VerificationError
from optimum_mla.measure import reference_logits, verify
from optimum_mla.nn import LatentAttention
from optimum_mla.pipeline import TextOptions, convert, export, quantize
from optimum_mla.report.schema import ConversionReport, ExportReport, QuantizationReport
from tests.cases import FAMILIES, METHODS, UNCALIBRATED, source_model, token_ids
from tests.nn.test_attention import FORMS, build

REFERENCE = "benchmarks/reference_model"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Mistral"])
def test_models_that_are_right_pass(family: str, form: str, dtype: torch.dtype) -> None:
    found = verify(build(family, form, dtype))
    assert found.cache_bytes_live == found.cache_bytes_predicted > 0
    assert found.cached_logits_error <= found.tolerance
    assert found.generated_tokens > 0
    assert found.reference_error is None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama with biases", "qwen3", "mistral with a window"])
def test_conversions_pass_and_have_the_error_that_they_predict(family: str, method: str) -> None:
    model = source_model(family)
    reference = reference_logits(model)
    transformation = METHODS[method](token_ids(6, 24))
    run = Run(transformation, model)
    verify(run.convert(), reference if transformation.preserves_computation else None)
    for result in run.results.values():
        assert result.output_error == pytest.approx(result.predicted_error, rel=0.01, abs=1e-4)


@pytest.mark.parametrize("backend", ["hqq", "quanto"])
def test_coded_caches_pass(backend: str) -> None:
    for settings in ({"residual_length": 0}, {"residual_length": 8, "rope_bits": 8}, {}):
        model = GQA2MLA(kv_cache_ratio=0.5)(source_model("llama"))
        found = verify(QuantizeLatentCache(bits=4, backend=backend, group_size=8, **settings)(model))
        assert found.cache_bytes_live == found.cache_bytes_predicted


def swallowing_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = LatentAttention.attend

    def without(self: Any, queries: Any, new: Any, rotation: Any, mask: Any, cache: Any, ids: Any, **rest: Any) -> Any:
        return attend(self, queries, new, rotation, mask if queries.shape[2] > 1 else None, None, ids, **rest)

    monkeypatch.setattr(LatentAttention, "attend", without)


def caching_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """Something of the size of a second cache is kept beside the first."""
    append = LatentLayer.append

    def doubled(self: Any, first: Any, second: Any) -> Any:
        view = append(self, first, second)
        self.kept = first.clone()
        monkeypatch.setattr(LatentLayer, "tensors", property(lambda layer: [layer.residual.plain.buffer, layer.kept]))
        return view

    monkeypatch.setattr(LatentLayer, "append", doubled)


def forgetting_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "optimum_mla.cache.positions.CachedPositions.last",
        lambda self, count, device: torch.zeros(1, count, dtype=torch.long, device=device),
    )
    monkeypatch.setattr("optimum_mla.cache.positions.CachedPositions.consecutive", False)


def scaling_what_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optimum_mla.ops.absorb.folded_queries", lambda queries, up: 0 * queries @ up[:1])


FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "a swallowed cache": (swallowing_the_cache, "weighs 0 bytes, but the shapes predict"),
    "a cache that holds more": (caching_too_much, "but the shapes predict"),
    "positions that are forgotten": (forgetting_positions, "logits through the cache differ"),
    "a decoding path that is wrong": (scaling_what_decodes, "logits through the cache differ"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("Llama", "rotary key rebuilt")
    verify(model)
    break_it, words = FAULTS[fault]
    break_it(monkeypatch)
    with pytest.raises(VerificationError, match=words):
        verify(model)


def test_other_logits_than_the_sources_are_found() -> None:
    model = source_model("llama")
    reference = reference_logits(model)
    GQA2MLA()(model)
    assert verify(model, reference).reference_error <= 1e-5  # type: ignore[operator]
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.mul_(1.05)
    with pytest.raises(VerificationError, match="the model that it was made from"):
        verify(model, reference)


def test_a_layer_that_differs_from_its_factorization_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = source_model("llama")
    expected = model(token_ids()).logits
    cast = Run._cast

    def wrong(self: Any, source: Any, tensors: Any) -> Any:
        found = cast(self, source, tensors)
        return {**found, "kv_b_proj.weight": 1.3 * found["kv_b_proj.weight"]}

    monkeypatch.setattr(Run, "_cast", wrong)
    with pytest.raises(VerificationError, match=r"layer 0 has an output error of .* but its factorization predicts"):
        MHA2MLA(kv_cache_ratio=0.5, rope_selection="high")(model)
    assert torch.equal(model(token_ids()).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mode_of_the_model_stays(family: str) -> None:
    model = GQA2MLA(kv_cache_ratio=0.5)(source_model(family)).train()
    verify(model)
    assert model.training


def test_reports_say_what_was_verified_and_a_failure_writes_no_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = TextOptions(calibration_data=f"{REFERENCE}/calibration.txt", calibration_samples=4, calibration_length=64)
    options = {"rope_cache": "cached", "shared_rope": True, "kv_cache_ratio": 0.5}
    convert(REFERENCE, tmp_path / "converted", options=options, texts=texts)
    quantize(str(tmp_path / "converted"), tmp_path / "quantized")
    export(str(tmp_path / "converted"), tmp_path / "exported")
    for kind, folder in (
        (ConversionReport, "converted"),
        (QuantizationReport, "quantized"),
        (ExportReport, "exported"),
    ):
        checked = kind.read(tmp_path / folder).verification
        assert checked["cache_bytes_live"] == checked["cache_bytes_predicted"] > 0
        assert checked["cached_logits_error"] <= checked["tolerance"]
    report = ConversionReport.read(tmp_path / "converted")
    assert report.perplexity_text == "held-back calibration"
    assert report.perplexity_before is not None
    swallowing_the_cache(monkeypatch)
    for write in (
        lambda: convert(REFERENCE, tmp_path / "new", texts=UNCALIBRATED),
        lambda: quantize(str(tmp_path / "converted"), tmp_path / "new"),
    ):
        with pytest.raises(VerificationError):
            write()
    kept = ".new.unfinished"  # of the conversion; the others begin with what is there
    assert sorted(path.name for path in tmp_path.iterdir()) == [kept, "converted", "exported", "quantized"]


def test_a_loss_that_is_more_than_small_is_said_first(tmp_path: Path) -> None:
    evaluation = {"eval_data": f"{REFERENCE}/evaluation.txt", "eval_samples": 8, "eval_length": 128}
    texts = TextOptions(uncalibrated=True, **evaluation)
    report = convert(REFERENCE, tmp_path / "bad", "x-ecomla", {"kv_cache_ratio": 0.25}, texts)
    assert report.quality_warning is not None
    assert f"went from {report.perplexity_before:.4g} to {report.perplexity_after:.4g}" in report.quality_warning
    card = (tmp_path / "bad" / "README.md").read_text()
    assert report.quality_warning in card
    from optimum_mla.report.render import summary_table

    assert report.quality_warning in summary_table([report]).splitlines()[0]
    assert summary_table([replace(report, quality_warning=None)]).splitlines()[0].startswith("method")
    good = convert(REFERENCE, tmp_path / "good", options={"kv_cache_ratio": 1.0}, texts=texts)
    assert good.quality_warning is None
    assert good.verification is not None
    assert good.verification["reference_error"] <= 0.1  # bfloat16


def test_the_exported_model_is_checked_without_this_package_in_it(tmp_path: Path) -> None:
    texts = TextOptions(calibration_data=f"{REFERENCE}/calibration.txt", calibration_samples=4, calibration_length=64)
    convert(REFERENCE, tmp_path / "out", texts=texts, export_format="deepseek_v3")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(model).__name__ == "DeepseekV3ForCausalLM"
    assert verify(model).cached_logits_error <= 1e-4
