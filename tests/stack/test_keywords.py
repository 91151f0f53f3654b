"""What `generate` hands on to a model is taken like a source model takes it."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_mla import XEcoMLA
from optimum_mla.stack import cache_argument

REFERENCE = Path(__file__).resolve().parents[2] / "benchmarks" / "reference_model"


def test_stop_strings_need_the_tokenizer_and_end_an_answer() -> None:
    model = XEcoMLA(kv_cache_ratio=0.5)(AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32))
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    inputs = tokenizer("Once upon a time there was", return_tensors="pt")
    options = {"max_new_tokens": 20, "do_sample": False}
    whole = model.generate(**inputs, **options)
    written = whole[0, inputs["input_ids"].shape[1] :].tolist()
    end = next(index for index in range(3, 20) if written[index] not in written[:index])
    options |= {"stop_strings": [tokenizer.decode(written[end])], "tokenizer": tokenizer}
    stopped = model.generate(**inputs, **options)
    assert stopped.tolist() == whole[:, : end - len(written) + 1 or None].tolist()
    assert model.generate(**inputs, **options, **cache_argument(model, model.make_cache())).tolist() == stopped.tolist()
