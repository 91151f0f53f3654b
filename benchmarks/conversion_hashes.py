"""Tell whether two versions of the package convert the embedded models to the same weights, to the last bit.

    python -m benchmarks.conversion_hashes > before.json     # in the older version
    python -m benchmarks.conversion_hashes before.json       # in the newer one: prints what differs, or "the same"

The hashes are those of one machine and one number of threads; another one may round the last digit otherwise.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.result import ROOT
from optimum_mla import GQA2MLA, MHA2MLA, XEcoMLA, fit_codec
from optimum_mla.calibrate import built_in_windows

MODELS = ("reference_model", "multi_head_model", "qwen3_model")
WINDOWS, LENGTH = 16, 256
CASES: dict[str, Callable[[Tensor], Any]] = {
    "gqa2mla": lambda ids: GQA2MLA(kv_cache_ratio=0.25, calibration=ids),
    "gqa2mla, cached": lambda ids: GQA2MLA(kv_cache_ratio=0.25, rope_cache="cached", calibration=ids),
    "gqa2mla, shared": lambda ids: GQA2MLA(
        kv_cache_ratio=0.5, rope_cache="cached", shared_rope="regular", latent_norm=True, calibration=ids
    ),
    "gqa2mla, full": lambda ids: GQA2MLA(kv_cache_ratio=0.5, positional="full", calibration=ids),
    "gqa2mla, split": lambda ids: GQA2MLA(energy=0.9),
    "mha2mla": lambda ids: MHA2MLA(kv_cache_ratio=0.5, calibration=ids),
    "mha2mla, uncalibrated": lambda ids: MHA2MLA(kv_cache_ratio=0.5),
    "x-ecomla": lambda ids: XEcoMLA(kv_cache_ratio=0.5, calibration=ids),
    "x-ecomla, uncalibrated": lambda ids: XEcoMLA(kv_cache_ratio=0.5, q_energy=0.9),
}
"""Conversions of every kind."""


def hashed(tensors: dict[str, Tensor]) -> str:
    """Return a hash of the names, shapes, dtypes and bits of tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hashes() -> dict[str, str]:
    """Return the hash of each conversion of each embedded model, and of a codec of each."""
    found = {}
    for name in MODELS:
        folder = ROOT / "benchmarks" / name
        ids = built_in_windows(AutoTokenizer.from_pretrained(folder), LENGTH, WINDOWS)

        def source(folder: Any = folder) -> Any:
            return AutoModelForCausalLM.from_pretrained(folder)

        for case, method in CASES.items():
            found[f"{name}: {case}"] = hashed(method(ids)(source()).state_dict())
            print(f"{name}: {case}", file=sys.stderr)
        codec = fit_codec(source(), ids, 0.125)
        found[f"{name}: codec"] = hashed(
            {f"{layer}.{part}": tensor for layer, own in codec.layers.items() for part, tensor in own.tensors.items()}
        )
    return found


def main() -> int:
    """Print the hashes, or what differs from those of a file."""
    torch.set_num_threads(1)
    found = hashes()
    if len(sys.argv) == 1:
        print(json.dumps(found, indent=1))
        return 0
    with open(sys.argv[1], encoding="utf-8") as file:
        before = json.load(file)
    differing = [case for case in sorted({*found, *before}) if found.get(case) != before.get(case)]
    print("\n".join(f"differs: {case}" for case in differing) or f"the same: {len(found)} conversions")
    return 1 if differing else 0


if __name__ == "__main__":
    raise SystemExit(main())
