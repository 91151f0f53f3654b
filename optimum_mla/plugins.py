"""This file holds the function that inference engines call when they start, by the entry points in `pyproject.toml`."""

from __future__ import annotations


def register() -> None:
    """Register the classes of converted models with Transformers' Auto classes.

    vLLM (`vllm.general_plugins`) and SGLang (`sglang.srt.plugins`) call this in every process before they load a model.
    Their Transformers backends then find the classes without `trust_remote_code`.
    """
    import optimum_mla.models  # noqa: F401
