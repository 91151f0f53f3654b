"""Coded models as the exports compute them: with the same channels, and latents that are not rounded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from optimum_mla.nn import LatentAttention


@contextmanager
def uncoded(model: nn.Module) -> Iterator[bool]:
    """Let a model compute with latents that are not rounded to their codes, as long as the context lasts.

    No format of other engines has such codes. The step and the centre of each channel are part of the projections, so
    the latents stand for the same keys and values, only without the error of rounding.

    Yields:
        Whether the model has codes.
    """
    coded = [m for m in model.modules() if isinstance(m, LatentAttention) and m.geometry.channel_bits]
    shapes = [attention.geometry for attention in coded]
    for attention in coded:
        attention.geometry = attention.geometry.uncoded()
    try:
        yield bool(coded)
    finally:
        for attention, shape in zip(coded, shapes, strict=True):
            attention.geometry = shape
