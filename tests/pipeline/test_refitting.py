"""`mla-calibrate --refit`: after training a codec is fitted again, and the better one is kept and said."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_mla import load_codec
from optimum_mla.cache.codec_layer import ExactTokens
from optimum_mla.convert.codec import fit_codec
from optimum_mla.convert.refit import refit_codec
from optimum_mla.core.errors import CalibrationDataError, UnsupportedModelError
from optimum_mla.models.codec import CODEC_FILE, ModelCodec
from optimum_mla.pipeline import TextOptions, refit
from tests.cases import source_model, token_ids

IDS = token_ids(1, 24 * 48)[0].tolist()
TEXTS = TextOptions(calibration_data=IDS, calibration_samples=16, calibration_length=48, calibration_repeats=0)
PROGRAM = str(Path(sys.executable).with_name("optimum-mla"))
REFERENCE = Path(__file__).resolve().parents[2] / "benchmarks" / "reference_model"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A trained model whose keys and values are other ones, and the codec of what it was before."""
    base = tmp_path_factory.mktemp("refit")
    model: Any = source_model("llama").eval()
    codec = fit_codec(model, token_ids(8, 48), 0.4, exact=ExactTokens(sinks=4, recent=8, together=4))
    codec.save(base / "codec")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                noise = torch.randn(projection.weight.shape, generator=generator)
                projection.weight.add_(2 * projection.weight.std() * noise)
    model.save_pretrained(base / "trained")
    return base / "trained", base / "codec"


def test_the_refitted_codec_has_the_same_bytes_and_moves_less(folders: tuple[Path, Path], tmp_path: Path) -> None:
    trained, before = folders
    model = AutoModelForCausalLM.from_pretrained(trained)
    with pytest.raises(UnsupportedModelError, match="are not those of the model that this codec"):
        load_codec(model, before)
    old = ModelCodec.load(before)
    again = refit_codec(model, old, token_ids(8, 48))
    for layer, codec in again.layers.items():
        assert codec.layout.bytes_per_token <= old.layers[layer].layout.bytes_per_token
    with pytest.raises(UnsupportedModelError, match="refit: got a codec of a llama of at least 3 layers"):
        refit_codec(source_model("qwen2"), old, token_ids(8, 48))


def test_the_better_one_is_written(folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, before = folders
    monkeypatch.setattr("optimum_mla.pipeline.checkpoint.Checkpoint.tokenizer", lambda *args, **kwargs: None)
    found = refit(str(trained), str(before), tmp_path / "out", TEXTS)
    assert found.refitted == (found.divergence_after < found.divergence_before)
    assert found.refitted
    assert [path.name for path in (tmp_path / "out").iterdir()] == [CODEC_FILE]
    load_codec(AutoModelForCausalLM.from_pretrained(trained), tmp_path / "out")
    monkeypatch.setattr("optimum_mla.pipeline.refitting.refit_codec", lambda model, codec, windows: codec)
    worse = refit(str(trained), str(tmp_path / "out"), tmp_path / "kept", TEXTS)
    assert not worse.refitted
    few = TextOptions(calibration_data=IDS, calibration_samples=2, calibration_length=48, calibration_repeats=0)
    with pytest.raises(CalibrationDataError, match="too few windows"):
        refit(str(trained), str(before), tmp_path / "none", few)
    assert not (tmp_path / "none").exists()


def test_the_command_says_which_one_it_kept(tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(REFERENCE)
    fit_codec(model, token_ids(4, 96), 0.25).save(tmp_path / "codec")  # of no text at all
    done = subprocess.run(
        [
            *(PROGRAM, "mla-calibrate", "-m", str(REFERENCE), "--refit", str(tmp_path / "codec")),
            *("--calibration-data", str(REFERENCE / "calibration.txt"), "--calibration-samples", "8"),
            *("--calibration-length", "288", str(tmp_path / "out")),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Predictions move by" in done.stdout
    assert f"The refitted codec was kept. Saved to {tmp_path / 'out'}" in done.stdout
    load_codec(model, tmp_path / "out")
