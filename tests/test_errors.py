"""What an error says, and what catches it."""

from __future__ import annotations

import pytest

from optimum_mla.errors import (
    CalibrationDataError,
    CorruptWeightsError,
    InvalidValueError,
    MissingDependencyError,
    MLAError,
    OutputError,
    UnsupportedModelError,
)


def test_a_bad_value_is_told_with_field_value_range_and_remedy() -> None:
    error = InvalidValueError("kv_lora_rank", 900, "1 to 512 for this model", "Lower it.")
    assert str(error) == "kv_lora_rank: got 900, allowed: 1 to 512 for this model. Lower it."
    assert (error.field, error.received, error.remedy) == ("kv_lora_rank", 900, "Lower it.")
    assert str(InvalidValueError("dtype", "int3", "float32")) == "dtype: got 'int3', allowed: float32."


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (InvalidValueError("a", 1, "2"), ValueError),
        (UnsupportedModelError("m"), ValueError),
        (CorruptWeightsError("w"), ValueError),
        (CalibrationDataError("t"), ValueError),
        (OutputError("o"), OSError),
        (MissingDependencyError("datasets", "train", "read a dataset"), ImportError),
    ],
)
def test_one_base_and_the_builtin_kind_catch_each(error: MLAError, builtin: type[Exception]) -> None:
    for kind in (MLAError, builtin):
        with pytest.raises(kind) as caught:
            raise error
        assert caught.value is error


def test_a_missing_package_names_the_extra_that_brings_it() -> None:
    error = MissingDependencyError("datasets", "train", "read 'books'")
    assert str(error) == "datasets is needed to read 'books'. Install it with: pip install 'optimum-mla[train]'"
