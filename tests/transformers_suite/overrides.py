"""Tests of ours in the place of those that cannot pass for a model with a latent cache, each with its reason."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import DynamicCache

from optimum_mla.cache import LatentCache
from optimum_mla.models import family_of
from optimum_mla.models.layers import model_geometry
from tests.transformers_suite.families import SOURCE, Kind, model_class, tiny_config

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


def stored_as_it_is(family: str, form: str, kind: Kind) -> None:
    """Check that a checkpoint holds the tensors of the modules under their own names, and that it loads whole."""
    config = tiny_config(family, form)
    cls = model_class(family, form, kind)
    model = cls(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        held = load_file(Path(folder) / "model.safetensors")
        loaded, notes = cls.from_pretrained(folder, output_loading_info=True)
    assert held.keys() == model.state_dict().keys()
    assert not any(notes[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.randint(3, config.vocab_size, (3, 7))
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids)[0], model(ids)[0])


def router_logits_are_returned(family: str, form: str, kind: Kind) -> None:
    """Check that `output_router_logits` gives the logits of every layer's router, as for the source."""
    config = tiny_config(family, form)
    ids = torch.randint(3, config.vocab_size, (3, 7))
    found = []
    for source in (True, False):
        cls = model_class(family, SOURCE if source else form, kind)
        model = cls(tiny_config(family, SOURCE) if source else config).eval()
        with torch.no_grad():
            found.append(model(ids, output_router_logits=True).router_logits)
    assert len(found[1]) == config.num_hidden_layers
    assert [logits.shape for logits in found[1]] == [logits.shape for logits in found[0]]


OVERRIDES: dict[str, Override] = {
    "test_bc_cache_name_forward": Override(
        "It skips itself unless the model returns exactly a `DynamicCache`; ours returns a `LatentCache`.",
        both_cache_names_work,
    ),
    "test_reverse_loading_mapping": Override(
        "Transformers saves the tensors of experts apart, and under other names than they have in a model. Converted "
        "models are stored as their modules are.",
        stored_as_it_is,
    ),
    "test_moe_models_record_router_logits": Override(
        "It skips itself unless the module that defines the class also defines experts.", router_logits_are_returned
    ),
}
"""Name of Transformers' test -> ours."""
