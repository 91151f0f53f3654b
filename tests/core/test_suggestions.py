"""A name that looks like a known one is recognised, and another is not."""

from __future__ import annotations

from optimum_mla.core.suggestions import did_you_mean


def test_a_misspelt_name_is_recognised_and_an_unlike_one_is_not() -> None:
    known = {"gqa2mla": 1, "mha2mla": 2, "x-ecomla": 3}
    assert did_you_mean("gqa2mal", known) == "Did you mean gqa2mla?"
    assert did_you_mean("xecomla", known) == "Did you mean x-ecomla?"
    assert did_you_mean("lora", known) == ""
