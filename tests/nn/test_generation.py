"""Generated tokens for every family, form and cache, by either path, padded or not, inside and beyond the window."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from tests.cases import token_ids
from tests.nn.test_attention import FAMILIES, FORMS, build, forced


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left-padded"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_cache_gives_the_tokens_of_no_cache(family: str, form: str, padded: bool) -> None:
    model, ids = build(family, form), token_ids(2, 14 if padded else 6)  # Mistral's window is 9
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = 0
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(ids, use_cache=False, **options)
    for cache in ("dynamic", "static"):
        for path in (nullcontext(), forced(model, absorb=True), forced(model, absorb=False)):
            with path:
                assert torch.equal(model.generate(ids, cache_implementation=cache, **options), expected), cache


@pytest.mark.parametrize("form", FORMS)
def test_positions_may_start_anywhere_and_restart(form: str) -> None:
    """Rotation is relative, and packed rows of one batch row do not see each other."""
    model, ids = build("Llama", form), token_ids(1, 20)
    with torch.no_grad():
        plain = model(ids).logits
        shifted = model(ids, position_ids=torch.arange(20)[None] + 50).logits
        restarting = torch.cat([torch.arange(8), torch.arange(12)])[None]
        packed = model(ids, position_ids=restarting, use_cache=False).logits
        first, second = model(ids[:, :8]).logits, model(ids[:, 8:]).logits
    assert (plain - shifted).abs().max() <= 1e-4
    assert (packed - torch.cat([first, second], dim=1)).abs().max() <= 1e-4
    assert (packed - plain).abs().max() > 1e-2
