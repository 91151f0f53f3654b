"""Statistics are what a walk measures on the source, and conversions use them in place of the text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from optimum_mla import GQA2MLA, MHA2MLA, CalibrationStatistics, XEcoMLA
from optimum_mla.calibrate.layer import LayerCalibration
from optimum_mla.calibrate.statistics_folder import FILE_NAME, file_name
from optimum_mla.calibrate.walk import CalibrationWalk
from optimum_mla.convert import Run
from optimum_mla.core.errors import CalibrationDataError, InvalidValueError
from optimum_mla.models.layer_source import LayerSource
from optimum_mla.ops.rope_mix import identity_mix
from tests.calibrate.walked import FAMILIES
from tests.cases import source_model, token_ids

IDS = token_ids(8, 32)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_they_are_what_a_walk_measures(family: str, tmp_path: Path) -> None:
    model = source_model(family, dtype=torch.float64)
    statistics = CalibrationStatistics.gather(model, IDS, tmp_path)
    source = LayerSource(model)
    walk = CalibrationWalk(source, IDS)
    for layer in range(source.num_layers):
        attention = source.attention(layer)
        measured, stored = LayerCalibration(walk, attention), statistics.layer(layer, attention)
        for name, tensor in vars(measured.moments).items():
            assert torch.equal(tensor, getattr(stored.moments, name)), name
        g = attention.geometry
        plain = identity_mix(g.num_key_value_heads, g.head_dim // 2)
        assert torch.equal(stored.contribution(), measured.contribution())
        assert torch.equal(stored.damage(plain), measured.damage(plain))
        assert torch.equal(stored.damage(stored.mix), measured.damage(measured.mix))
        with pytest.raises(CalibrationDataError, match="damage for this mix"):
            stored.damage(identity_mix(g.num_key_value_heads, g.head_dim // 2)._replace(keys=2 * plain.keys))
        walk.advance()


def test_the_first_layer_is_the_same_as_with_the_text(family: str, tmp_path: Path) -> None:
    statistics = CalibrationStatistics.gather(source_model(family), IDS, tmp_path)
    options = {"kv_cache_ratio": 0.4, "heal": False, "rank_allocation": "uniform"}
    for method, more in ((GQA2MLA, {}), (GQA2MLA, {"positional": "full"}), (MHA2MLA, {"qk_rope_head_dim": 4})):
        first = [
            method(calibration=given, **options, **more)(source_model(family)).model.layers[0].self_attn.state_dict()
            for given in (IDS, statistics)
        ]
        assert first[0].keys() == first[1].keys()
        for name, tensor in first[0].items():
            assert torch.equal(tensor, first[1][name]), name


@pytest.mark.parametrize(
    "method",
    [
        GQA2MLA(kv_cache_ratio=0.3, calibration=IDS),
        GQA2MLA(kv_cache_ratio=0.5, rope_cache="cached", calibration=IDS),
        GQA2MLA(kv_cache_ratio=0.5, rope_cache="cached", shared_rope=True, calibration=IDS),
        GQA2MLA(energy=0.9, calibration=IDS),
        GQA2MLA(kv_lora_rank=12, positional="full", rank_allocation="energy", calibration=IDS),
        MHA2MLA(kv_cache_ratio=0.6, calibration=IDS),
        MHA2MLA(kv_cache_ratio=0.6, rope_selection="contribution", qk_rope_head_dim=4, calibration=IDS),
        XEcoMLA(kv_cache_ratio=0.5, qk_rope_head_dim=4, calibration=IDS),
    ],
    ids=lambda method: f"{method.name}-{method.rank_allocation}",
)
def test_every_form_converts_with_them(method: GQA2MLA, tmp_path: Path) -> None:
    model = source_model("llama")
    statistics = CalibrationStatistics.gather(model, IDS, tmp_path)
    given = {name: value for name, value in method.options.items() if name != "heal"}
    run = Run(type(method)(calibration=statistics, **given), model)
    converted = run.convert()
    assert converted(IDS[:1]).logits.isfinite().all()
    assert all(result.state_error is None for result in run.results.values())
    if method.budget.kv_cache_ratio is not None:
        cached = sum(result.geometry.cache_numbers for result in run.results.values())
        source = sum(result.geometry.source_cache_numbers for result in run.results.values())
        assert cached / source == pytest.approx(method.budget.kv_cache_ratio, abs=0.03)


def test_the_layers_share_the_cache_by_predicted_error(tmp_path: Path) -> None:
    model = source_model("llama")
    with torch.no_grad():  # One layer says almost nothing, so the others deserve its ranks.
        model.model.layers[1].self_attn.o_proj.weight *= 1e-4
    statistics = CalibrationStatistics.gather(model, IDS, tmp_path)
    run = Run(GQA2MLA(kv_cache_ratio=0.4, calibration=statistics), model)
    run.convert()
    ranks = [result.geometry.kv_lora_rank for result in run.results.values()]
    assert ranks[1] == min(ranks) < max(ranks)


def test_what_needs_the_text_is_refused(tmp_path: Path) -> None:
    statistics = CalibrationStatistics.gather(source_model("llama"), IDS, tmp_path)
    with pytest.raises(InvalidValueError, match="heal: got True, allowed: False with statistics"):
        GQA2MLA(kv_cache_ratio=0.5, calibration=statistics, heal=True)
    with pytest.raises(InvalidValueError, match="qk_rope_head_dim: got None, allowed: a number for x-ecomla"):
        XEcoMLA(kv_cache_ratio=0.5, calibration=statistics)(source_model("llama"))


def test_statistics_of_another_model_are_refused(tmp_path: Path) -> None:
    statistics = CalibrationStatistics.gather(source_model("llama"), IDS, tmp_path)
    other = source_model("llama")
    with torch.no_grad():
        other.model.layers[0].self_attn.v_proj.weight[0, 0] += 1e-3
    with pytest.raises(CalibrationDataError, match="attention in layer 0 has other weights"):
        GQA2MLA(kv_cache_ratio=0.5, calibration=statistics)(other)


def test_a_folder_is_read_again_and_its_faults_are_told(tmp_path: Path) -> None:
    model = source_model("llama")
    made = CalibrationStatistics.gather(model, IDS, tmp_path, {"source": "x", "windows": 8, "tokens_per_window": 32})
    read = CalibrationStatistics.read(tmp_path)
    assert (len(read), read.digest, read.data) == (len(made), made.digest, made.data)
    attention = LayerSource(model).attention(0)
    damaged = bytearray((tmp_path / file_name(0)).read_bytes())
    damaged[-1] ^= 1
    (tmp_path / file_name(0)).write_bytes(damaged)
    with pytest.raises(CalibrationDataError, match="is damaged"):
        read.layer(0, attention)
    (tmp_path / file_name(0)).unlink()
    with pytest.raises(CalibrationDataError, match="could not be read"):
        read.layer(0, attention)
    about = json.loads((tmp_path / FILE_NAME).read_text())
    (tmp_path / FILE_NAME).write_text(json.dumps({**about, "format": 99}))
    with pytest.raises(CalibrationDataError, match="is not of format 2"):
        CalibrationStatistics.read(tmp_path)
    (tmp_path / FILE_NAME).write_text("{")
    with pytest.raises(CalibrationDataError, match="holds no statistics"):
        CalibrationStatistics.read(tmp_path)
