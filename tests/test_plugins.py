"""The entry points that inference engines call."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points

import pytest

STARTED = """
    import sys
    from importlib.metadata import entry_points
    from transformers import AutoConfig

    (point,) = [point for point in entry_points(group=sys.argv[1]) if point.name == "optimum_mla"]
    point.load()()
    import transformers
    print(type(AutoConfig.for_model("llama_mla")).__name__, transformers.LlamaMLAForCausalLM.__name__)
"""


@pytest.mark.parametrize("group", ["vllm.general_plugins", "sglang.srt.plugins"])
def test_an_engine_that_starts_knows_the_classes(group: str) -> None:
    program = "\n".join(line[4:] for line in STARTED.splitlines())
    done = subprocess.run([sys.executable, "-c", program, group], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["LlamaMLAConfig", "LlamaMLAForCausalLM"], done.stderr


def test_nothing_else_is_asked_for_at_the_start_of_an_engine() -> None:
    for group in ("vllm.general_plugins", "sglang.srt.plugins"):
        assert [point.value for point in entry_points(group=group)] == ["optimum_mla.plugins:register"]
