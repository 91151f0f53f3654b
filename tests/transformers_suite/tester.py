"""The test classes of Transformers, filled with one of our configs or of its source's.

A test class of Transformers is a `unittest.TestCase` with a `model_tester` that makes configs and inputs. `case_of`
returns such a class for one family, form and kind of model.
"""

from __future__ import annotations

from functools import cache
from typing import Any
from unittest import TestCase

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from tests.transformers_suite import upstream
from tests.transformers_suite.families import SIZES, SOURCE, Kind, config_class, config_fields, model_class, tiny_config


class Tester:
    """Makes configs and inputs for the mixins.

    Args:
        parent: The running test case.
    """

    batch_size = 13
    seq_length = 7
    is_training = True
    vocab_size = SIZES["vocab_size"]
    hidden_size = SIZES["hidden_size"]
    num_hidden_layers = SIZES["num_hidden_layers"]
    num_attention_heads = SIZES["num_attention_heads"]

    def __init__(self, parent: TestCase, family: str, form: str, kind: Kind) -> None:
        self.parent, self.family, self.form = parent, family, form
        self.base_model_class = model_class(family, form, "Model")
        self.causal_lm_class = model_class(family, form, "ForCausalLM")

    def get_config(self) -> PreTrainedConfig:
        """Return a fresh config."""
        return tiny_config(self.family, self.form)

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, Tensor]]:
        """Return a fresh config and a batch of ids in which no token is special, with a causal mask's shape."""
        ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids).tril()}


@cache
def case_of(family: str, form: str, kind: Kind) -> type[TestCase]:
    """Return the test class of one family, attention form and kind of model.

    Args:
        form: A key of `FORMS`, or `SOURCE` for the class of Transformers.
    """
    common = upstream.load("test_modeling_common")
    configuration = upstream.load("test_configuration_common")
    bases: list[type] = [common.ModelTesterMixin]
    if kind == "ForCausalLM":
        bases.append(common.GenerationTesterMixin)
        for module, name in (
            ("test_training_mixin", "TrainingTesterMixin"),
            ("test_fsdp_mixin", "FSDPTesterMixin"),
            ("test_tensor_parallel_mixin", "TensorParallelTesterMixin"),
        ):
            bases.append(getattr(upstream.load(module), name))

    def set_up(self: Any) -> None:
        self.model_tester = Tester(self, family, form, kind)
        self.config_tester = configuration.ConfigTester(
            self, config_class=config_class(family, form), **config_fields(form)
        )

    def test_config(self: Any) -> None:
        self.config_tester.run_common_tests()

    def tiny_distributed_config(self: Any) -> tuple[type[PreTrainedConfig], dict[str, Any]]:
        # The mixin's own version changes the numbers of heads, to which a latent's shape would have to follow.
        config = self.model_tester.get_config()
        config.vocab_size, config.intermediate_size = 256, 128
        return type(config), config.to_diff_dict()

    name = f"{family}{'' if form == SOURCE else form.title().replace('-', '')}{kind}Test"
    content = {
        "__module__": __name__,
        "all_model_classes": (model_class(family, form, kind),),
        # Transformers skips this one for models added before 2023, and reads the year from the source file.
        "test_can_init_all_missing_weights_before_2023": True,
        "model_tester": None,
        "setUp": set_up,
        "test_config": test_config,
        "_get_tiny_config": tiny_distributed_config,
    }
    return type(name, (*bases, TestCase), content)


def names_of(kind: Kind) -> list[str]:
    """Return the names of all tests of a kind of model, sorted."""
    case = case_of("Llama", SOURCE, kind)
    return sorted(name for name in dir(case) if name.startswith("test_") and callable(getattr(case, name)))


def is_distributed(name: str) -> bool:
    """Return whether a test starts processes."""
    return name.startswith(("test_fsdp2_", "test_hsdp_", "test_tp_forward", "test_tp_backward", "test_tp_generation"))
