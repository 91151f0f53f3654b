"""Who is timed, how often, in which order; and next-token quality, against counts by hand. No speed is asserted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Cache, DynamicCache

from optimum_mla import XEcoMLA
from optimum_mla.measure.memory import PeakMemory, large_tensors, living_storages
from optimum_mla.measure.quality import Mean, compare_decoding, evaluating
from optimum_mla.measure.speed import Contender, spread, time_in_turn
from tests.cases import source_model, token_ids


def test_contenders_take_turns_and_the_first_round_does_not_count() -> None:
    source = source_model("llama")
    converted = XEcoMLA(kv_cache_ratio=0.5)(source_model("llama")).train()
    order: list[str] = []

    def made(name: str, model: Any) -> Cache:
        order.append(name)
        return DynamicCache(config=model.config)

    pair = [
        Contender(source, lambda: made("source", source)),
        Contender(converted, lambda: made("converted", converted)),
    ]
    time_in_turn(pair, token_ids(2, 9), new_tokens=3, repeats=2)
    assert order == ["source", "converted"] * 3
    assert converted.training
    for one in pair:
        assert (len(one.prefill_seconds), len(one.step_seconds)) == (2, 6)
        assert all(seconds > 0 for seconds in one.prefill_seconds + one.step_seconds)
        assert one.attention_share is not None
        assert 0 < one.attention_share < 1
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in converted.modules())


def test_spread_is_that_of_the_quartiles() -> None:
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 3)
    assert spread([7.0]) == 0.0


@pytest.mark.parametrize("stride", [1, 5, 11])
def test_quality_through_the_cache_is_that_of_whole_logits(stride: int) -> None:
    source = source_model("llama")
    converted = XEcoMLA(kv_cache_ratio=0.5)(source_model("llama"))
    windows = token_ids(3, 12)
    found = compare_decoding(
        converted, converted.make_cache, windows, stride, source, lambda: DynamicCache(config=source.config)
    )
    places = slice(12 - stride - 1, 11)
    with torch.no_grad():
        given, wanted = (model(windows).logits.double().log_softmax(-1)[:, places] for model in (converted, source))
    targets = windows[:, 12 - stride :, None]
    assert found.tokens == 3 * stride
    assert found.perplexity == pytest.approx(math.exp(-given.gather(-1, targets).mean().item()), rel=1e-5)
    assert found.baseline_perplexity == pytest.approx(math.exp(-wanted.gather(-1, targets).mean().item()), rel=1e-5)
    assert found.kl == pytest.approx((wanted.exp() * (wanted - given)).sum(-1).mean().item(), rel=1e-4)
    assert found.agreement == (given.argmax(-1) == wanted.argmax(-1)).double().mean().item()
    # Windows are what is independent: the standard error is that of their means.
    apart = (wanted.exp() * (wanted - given)).sum(-1)
    off = (wanted - given).gather(-1, targets)[..., 0]
    for values, error in ((apart, found.kl_stderr), (off, found.loss_stderr)):
        assert error == pytest.approx(values.mean(1).std().item() / len(windows) ** 0.5, rel=1e-3)


def test_the_standard_error_of_a_mean_counts_sequences() -> None:
    generator = torch.Generator().manual_seed(0)
    several = [torch.randn(count, generator=generator) + shift for count, shift in ((3, 0.0), (9, 1.0), (6, 2.0))]
    mean = Mean.of(several)
    assert mean.value == pytest.approx(float(torch.cat(several).double().mean()))
    apart = [float((values.double() - mean.value).sum()) for values in several]
    assert mean.stderr == pytest.approx((sum(one**2 for one in apart) * 3 / 2) ** 0.5 / 18)
    assert Mean.of(several[:1]).stderr is None
    assert Mean.of([torch.ones(4), torch.ones(2)]) == Mean(1.0, 0.0)


def test_a_model_agrees_with_itself() -> None:
    model = source_model("llama")
    make = lambda: DynamicCache(config=model.config)  # noqa: E731
    found = compare_decoding(model, make, token_ids(2, 8), 4, model, make)
    assert (found.agreement, found.kl) == (1.0, pytest.approx(0.0, abs=1e-7))
    alone = compare_decoding(model, make, token_ids(2, 8), 4)
    assert (alone.agreement, alone.kl, alone.baseline_perplexity) == (None, None, None)
    assert alone.perplexity == found.perplexity


def test_a_failing_measurement_leaves_the_mode_as_it_was() -> None:
    model = source_model("llama").train()
    with pytest.raises(IndexError), evaluating(model):
        model(torch.tensor([[10**6]]))
    assert model.training


def test_something_of_full_size_beside_the_cache_is_found() -> None:
    model = XEcoMLA(kv_cache_ratio=0.5)(source_model("llama"))
    cache, ids = model.make_cache(), token_ids(1, 100)
    model.loaded_with_it = torch.zeros(1, 2, 100, 16)
    # Stand-ins that a compiler keeps have no memory.
    stand_in = FakeTensorMode().from_tensor(torch.ones(1, 2, 100, 16))
    before = living_storages()
    assert len(stand_in) == 1
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
    full = 100 * 2 * 16 * 4
    assert large_tensors(before, cache, full) == []
    model.kept = torch.zeros(1, 2, 100, 16)
    assert large_tensors(before, cache, full) == ["[1, 2, 100, 16] float32"]
    assert large_tensors(before, cache, full + 1) == []
    model.kept = model.kept[:, :, :1]  # a view keeps all of it
    assert large_tensors(before, cache, full) == ["[1, 2, 1, 16] float32"]
    del model.kept
    assert large_tensors(before, cache, full) == []


def test_peak_memory_rises_with_what_is_allocated() -> None:
    peak = PeakMemory(torch.device("cpu"))
    if not peak.reset():
        pytest.skip("the system cannot reset the high-water mark")
    before = peak.bytes()
    held = torch.ones(2**24)  # 64 MiB
    assert peak.bytes() - before > 48e6
    del held
    peak.reset()
    assert peak.bytes() < before + 48e6
