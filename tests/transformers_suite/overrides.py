"""Tests of ours in the place of those that cannot pass for a model with a latent cache, each with its reason."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import DynamicCache

from optimum_mla.cache import LatentCache
from optimum_mla.models import family_of
from optimum_mla.models.layers import model_geometry
from tests.transformers_suite.families import Kind, model_class, tiny_config

Check = Callable[[str, str, Kind], None]


@dataclass(frozen=True)
class Override:
    """What stands for one test of Transformers.

    Args:
        reason: Why that test cannot pass for our classes.
        check: Takes family, form and kind, and raises an AssertionError where ours is wrong.
    """

    reason: str
    check: Check


def both_cache_names_work(family: str, form: str, kind: Kind) -> None:
    """Check that a cache is filled under the old and the new name of the argument, and that only the old one warns."""
    config = tiny_config(family, form)
    model = model_class(family, form, kind)(config).eval()
    ids = torch.randint(3, config.vocab_size, (3, 7))
    numbers = [layer.cache_numbers for layer in model_geometry(family_of(config).spec, config).layers]
    with torch.no_grad():
        assert type(model(ids, use_cache=True).cache) is LatentCache
        for name, outdated in (("cache", False), ("past_key_values", True)):
            given = DynamicCache(config=config)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                output = model(ids, use_cache=True, **{name: given})
            renamed = [w for w in caught if w.category is FutureWarning and f"`{name}`" in str(w.message)]
            assert bool(renamed) == outdated
            assert output.cache is given
            assert given.get_seq_length() == ids.shape[1]
            # The latent's own shape, not that of expanded keys and values.
            held = [layer.keys[0, :, 0].numel() + layer.values[0, :, 0].numel() for layer in given.layers]
            assert held == numbers


OVERRIDES: dict[str, Override] = {
    "test_bc_cache_name_forward": Override(
        "It skips itself unless the model returns exactly a `DynamicCache`; ours returns a `LatentCache`.",
        both_cache_names_work,
    ),
}
"""Name of Transformers' test -> ours."""
