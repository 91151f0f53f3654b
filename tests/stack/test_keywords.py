"""What `generate` hands on to a model is taken like a source model takes it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_mla import XEcoMLA
from optimum_mla.stack import cache_argument
from optimum_mla.stack.cache_argument import cache_parameter
from optimum_mla.stack.keywords import parameter_names

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


@pytest.mark.parametrize("memo", [parameter_names, cache_parameter])
def test_functions_that_are_made_again_and_again_are_not_kept_for_ever(memo: Any) -> None:
    def made() -> Callable[[int], int]:
        return lambda number: number

    first = weakref.ref(function := made())
    memo(function)
    del function
    assert first() is not None
    for _ in range(memo.cache_info().maxsize):
        memo(made())
    gc.collect()
    assert first() is None
    assert memo.cache_info().currsize == memo.cache_info().maxsize
