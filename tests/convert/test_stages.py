"""What a conversion says while it runs: every stage that takes time says so, and comes to its end."""

from __future__ import annotations

import re

import pytest

from optimum_mla import GQA2MLA
from optimum_mla.calibrate import sensitivity, walk
from optimum_mla.convert import Run
from optimum_mla.core import progress
from tests.cases import source_model, token_ids


@pytest.mark.parametrize("shared", [False, True])
def test_every_stage_reaches_its_total(
    shared: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "DELAY_SECONDS", 0.0)
    monkeypatch.setattr(sensitivity, "TOKENS_AT_ONCE", 64)
    monkeypatch.setattr(walk, "TOKENS_PER_BATCH", 24)
    form = {"rope_cache": "cached", "shared_rope": True} if shared else {}
    run = Run(
        GQA2MLA(calibration=token_ids(6, 24), kv_cache_ratio=0.5, **form),
        source_model("llama"),
        evaluation=token_ids(2, 24),
    )
    run.convert()
    said = re.findall(r"^gqa2mla: ([a-z ]+): (\d+) of (\d+), ", capsys.readouterr().err, re.M)
    stages = list(dict.fromkeys(name for name, _, _ in said))
    first = "rotary dims" if shared else "rank allocation"
    assert stages == [first, "effect on the predictions", "layers", "perplexity"]
    for stage in stages:
        done, total = [(int(done), int(total)) for name, done, total in said if name == stage][-1]
        assert done == total > 0
    assert run.perplexities is not None
