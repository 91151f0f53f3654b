"""Import the tests of Transformers that were fetched, as the package `transformers_tests`.

The distribution carries the model mixins but not everything that they import. What is missing has a stand-in here: an
empty mixin where the missing file only adds tests (generation and export, which `test_modes.py` covers instead), and
our own code where it starts processes.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from types import ModuleType
from typing import Any

from tests.transformers_suite import processes
from tests.transformers_suite.fetch import TESTS

PACKAGE = "transformers_tests"
COMMON_CONFIG = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["BertModel"],
    "id2label": {0: "label"},
    "label2id": {"label": 0},
    "problem_type": "regression",
}
"""Arguments that every config takes, each with a value that is not its default."""


class ExportTesterMixin:
    """Adds no test, where the distribution lacks those of exporters."""


class GenerationTesterMixin:
    """Adds no test, where the distribution lacks those of generation."""


def _stand_in(name: str, is_package: bool = False, **content: Any) -> None:
    """Register a module under the package's name."""
    spec = ModuleSpec(f"{PACKAGE}.{name}" if name else PACKAGE, None, is_package=is_package)
    module = module_from_spec(spec)
    vars(module).update(content)
    sys.modules[spec.name] = module


def load(name: str) -> ModuleType:
    """Return one of the fetched test modules, for example `test_modeling_common`.

    Raises:
        ModuleNotFoundError: The distribution does not carry it.
    """
    if PACKAGE not in sys.modules:
        _stand_in("", is_package=True)
        sys.modules[PACKAGE].__path__ = [str(TESTS)]
        for package in ("exporters", "generation", "utils"):
            _stand_in(package, is_package=True)
        _stand_in("exporters.test_export", ExportTesterMixin=ExportTesterMixin)
        _stand_in("generation.test_utils", GenerationTesterMixin=GenerationTesterMixin)
        _stand_in("utils.test_configuration_utils", config_common_kwargs=COMMON_CONFIG)
        _stand_in("distributed_testing_utils", **processes.TESTING_UTILITIES)
    module = import_module(f"{PACKAGE}.{name}")
    for allowed in ("FSDP_DISTRIBUTED_TEST_MODEL_TYPES", "TP_DISTRIBUTED_TEST_MODEL_TYPES"):
        if hasattr(module, allowed):
            # Lists of the model types that are worth the time to Transformers; None, its own value for all, adds ours.
            setattr(module, allowed, None)
    return module
