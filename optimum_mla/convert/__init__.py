"""Conversions: what drives a method over the layers of a model, and keeps what it reads and finds."""

from optimum_mla.convert.record import LayerResult, Record
from optimum_mla.convert.run import Run

__all__ = ["LayerResult", "Record", "Run"]
