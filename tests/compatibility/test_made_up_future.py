"""A release of Transformers that does not exist: the installed one, with another name for the cache argument."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from transformers.models.llama.modeling_llama import LlamaModel

OLD, NEW = "past_key_values", "kv_store"

pytestmark = [
    pytest.mark.compat,
    pytest.mark.skipif(
        OLD not in inspect.signature(LlamaModel.forward).parameters,
        reason=f"the installed Transformers does not say `{OLD}`, and its own name is too common a word to replace",
    ),
]

USE = f"""
import inspect
import torch, transformers
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaModel
from optimum_mla import GQA2MLA
from optimum_mla.measure.memory import live_cache_bytes
from tests.cases import source_model, token_ids

parameters = inspect.signature(LlamaModel.forward).parameters
assert "{NEW}" in parameters and "{OLD}" not in parameters, list(parameters)
ids = token_ids(2, 12)
half = {{"kv_cache_ratio": 0.5}}
for family in ("qwen3", "mistral with a window"):
    for form in (GQA2MLA(), GQA2MLA(positional="full", **half), GQA2MLA(calibration=ids, **half)):
        model = form(source_model(family), copy=True)
        with torch.no_grad():
            whole = model(ids, use_cache=False)
            assert whole.{NEW} is None
            cache = DynamicCache(config=model.config)
            pieces = [model(ids[:, :7], {NEW}=cache), model(ids[:, 7:], {NEW}=cache)]
            assert pieces[1].{NEW} is cache
            logits = torch.cat([piece.logits for piece in pieces], dim=1)
            assert (logits - whole.logits).abs().max() <= 1e-4
            filled = [cache]
            if "window" not in family:
                filled.append(model(ids).{NEW})
        expected = model.generate(ids, use_cache=False, max_new_tokens=8, do_sample=False)
        for kind in ("latent", "dynamic", "static"):
            options = {{}} if kind == "latent" else {{"cache_implementation": kind}}
            got = model.generate(ids, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, **options)
            assert torch.equal(got.sequences, expected), kind
            assert got.{NEW}.get_seq_length() == 19, kind
        beams = {{"num_beams": 3, "max_new_tokens": 8, "do_sample": False}}
        assert torch.equal(model.generate(ids, **beams), model.generate(ids, use_cache=False, **beams))
        if "window" not in family:
            for cache in filled:
                assert live_cache_bytes(cache) == 2 * 12 * model.geometry.cache_numbers * 4 > 0
print(transformers.__file__)
"""


@pytest.fixture(scope="module")
def future(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the Python files of the installed Transformers, in which the argument has a new name."""
    source = Path(transformers.__file__).parent
    folder = tmp_path_factory.mktemp("future")
    for file in source.rglob("*.py"):
        copy = folder / "transformers" / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(file.read_text(encoding="utf-8").replace(OLD, NEW), encoding="utf-8")
    return folder


def test_a_third_name_of_the_cache_argument_is_used(future: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(future), str(root)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", USE], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.split()[-1]).is_relative_to(future)
