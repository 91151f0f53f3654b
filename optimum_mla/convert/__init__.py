"""Conversions: what drives a method over the layers of a model, and keeps what it reads and finds."""

from optimum_mla.convert.run import LayerResult, Run

__all__ = ["LayerResult", "Run"]
