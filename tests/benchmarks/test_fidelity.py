"""The divergence and the excess are those of whole sequences, from the place on from which tokens count."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from benchmarks import fidelity
from benchmarks.coded_caches import coded_cache
from tests.cases import source_model, token_ids


def test_the_source_is_compared_with_itself_and_with_a_coded_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "TOKENS_AT_ONCE", 40)  # two windows at once
    source, ids, start = source_model("llama"), token_ids(5, 20), 9
    make_cache = partial(coded_cache, source.config, "kivi-int2", 0)
    same, coded = fidelity.compared(source, [(source, None), (source, make_cache)], ids, start)
    assert same["divergence"] == pytest.approx(0, abs=1e-6)
    assert same["excess"] == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        before = source(ids).logits.log_softmax(-1)[:, start:-1]
        after = source(ids, past_key_values=make_cache(), use_cache=True).logits.log_softmax(-1)[:, start:-1]
    divergence = torch.nn.functional.kl_div(after, before, reduction="none", log_target=True).sum(-1).mean()
    assert coded["divergence"] == pytest.approx(float(divergence), rel=1e-3)
    targets = ids[:, start + 1 :, None]
    assert coded["excess"] == pytest.approx(float((before - after).gather(2, targets).mean()), rel=1e-3, abs=1e-5)
    assert coded["divergence"] > 1e-4
