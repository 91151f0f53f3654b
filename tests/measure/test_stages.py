"""Stages and samples of a conversion."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_mla.measure.sample import BEGINNING, NEW_TOKENS, QUESTION, continuation, sample_prompt
from optimum_mla.measure.stages import Stages

REFERENCE = Path(__file__).resolve().parents[2] / "benchmarks" / "reference_model"


def test_a_stage_has_its_own_time_and_peak() -> None:
    stages = Stages()
    with stages.stage("large"):
        held = torch.ones(50_000_000)  # 200 MB
        time.sleep(0.05)
    del held
    with stages.stage("small"):
        pass
    with stages.stage("large"):
        time.sleep(0.05)
    assert [stage.name for stage in stages.done] == ["small", "large"]
    small, large = stages.done
    assert large.seconds >= 0.1 > small.seconds
    assert stages.peak() >= 200e6
    if small.peak_bytes is not None and large.peak_bytes is not None:
        assert large.peak_bytes - small.peak_bytes > 100e6


def test_the_sample_is_the_greedy_continuation() -> None:
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    model = AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32).train()
    prompt, ids = sample_prompt(tokenizer)
    assert prompt == BEGINNING
    text = continuation(model, tokenizer, ids)
    new = ids
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            new = torch.cat([new, model.eval()(new).logits[:, -1:].argmax(-1)], 1)
    assert text == tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}!{% endif %}"
    )
    prompt, ids = sample_prompt(tokenizer)
    assert prompt == QUESTION
    assert tokenizer.decode(ids[0]) == f"[{QUESTION}]!"
