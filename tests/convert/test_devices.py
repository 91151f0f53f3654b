"""Conversions and decoding keep to the device of the model, shown on a device that is not there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys, tempfile, warnings
warnings.simplefilter("ignore")
import torch
from tests.devices import DEVICE, Placed
import optimum_mla.nn.decoupled, optimum_mla.nn.full_rope
from optimum_mla import GQA2MLA, MHA2MLA, XEcoMLA, fit_codec
from optimum_mla.cache.codec_layer import ExactTokens
from optimum_mla.calibrate.statistics_folder import CalibrationStatistics
from optimum_mla.convert import Run
from optimum_mla.models.coded import with_codec
from tests.cases import source_model, token_ids

# Weights of a class of their own count as quantized, for which the cache is expanded; those of a GPU have none.
for module in (optimum_mla.nn.decoupled, optimum_mla.nn.full_rope):
    module.is_plain = lambda projection: True

WAYS = {
    "gqa2mla": lambda ids: GQA2MLA(kv_cache_ratio=0.5, calibration=ids),
    "gqa2mla, cached": lambda ids: GQA2MLA(kv_cache_ratio=0.5, rope_cache="cached", calibration=ids),
    "mha2mla": lambda ids: MHA2MLA(kv_cache_ratio=0.5, calibration=ids),
    "x-ecomla": lambda ids: XEcoMLA(kv_cache_ratio=0.5, q_energy=0.9, calibration=ids),
    "uncalibrated": lambda ids: MHA2MLA(kv_cache_ratio=0.5),
    "gqa2mla, statistics": lambda ids: GQA2MLA(kv_cache_ratio=0.5, calibration=stored),
    "mha2mla, statistics": lambda ids: MHA2MLA(kv_cache_ratio=0.5, calibration=stored),
    "x-ecomla, statistics": lambda ids: XEcoMLA(kv_cache_ratio=0.5, qk_rope_head_dim=4, calibration=stored),
}

def there(model):
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.device.type == DEVICE.type, name

family, *ways = sys.argv[1:]
for way in ways:
    # Every operation on a device that is not there is slow, so the model and the text are as small as they can be.
    model, ids = source_model(family, num_hidden_layers=2), token_ids(4, 20)
    if way == "codes":
        exact = ExactTokens(sinks=2, recent=4, together=4)
        with Placed(), torch.no_grad():
            model, codec = model.to(DEVICE), fit_codec(model.to(DEVICE), ids, 0.5, 0, exact)
            cache = with_codec(model, codec).make_cache()
            for part in (ids[:2, :16], ids[:2, 16:17]):
                logits = model(part.to(DEVICE), past_key_values=cache, use_cache=True).logits
            there(model)
            assert logits.device.type == DEVICE.type
            assert {tensor.device.type for layer in cache.layers for tensor in layer.tensors} == {DEVICE.type}
        print("passed", way, flush=True)
        continue
    stored = CalibrationStatistics.gather(model, ids, tempfile.mkdtemp()) if "statistics" in way else None
    with Placed(), torch.no_grad():
        model = model.to(DEVICE)
        method = WAYS[way](ids)
        model = Run(method, model).convert()
        there(model)
        ids = ids[:2].to(DEVICE)
        whole = model(ids).logits
        cache = model.make_cache()
        model(ids[:, :16], past_key_values=cache, use_cache=True)
        step = model(ids[:, 16:17], past_key_values=cache, use_cache=True).logits
        assert float((step[:, 0] - whole[:, 16]).norm()) <= 0.03 * float(whole[:, 16].norm())
    print("passed", way, flush=True)
"""


@pytest.mark.parametrize(
    ("family", "ways"),
    [
        ("llama", ["gqa2mla", "codes", "mha2mla", "mha2mla, statistics", "uncalibrated"]),
        ("qwen3", ["gqa2mla, cached", "x-ecomla", "gqa2mla, statistics"]),
        ("granite", ["mha2mla, statistics", "x-ecomla, statistics"]),
    ],
)
def test_no_step_mixes_devices(family: str, ways: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, family, *ways],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
    )
    assert done.stdout.count("passed") == len(ways), done.stdout + done.stderr[-3000:]
