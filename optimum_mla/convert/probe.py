"""Comparison of a converted layer's error on seeded random states with the error that its factorization predicts."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from optimum_mla.core.errors import VerificationError
from optimum_mla.families.project import SourceAttention
from optimum_mla.nn import LatentAttention
from optimum_mla.nn.decoupled import LATENT_NORM_EPS
from optimum_mla.nn.reference import reference_attention
from optimum_mla.stack import rotary_table

PROBE_TOKENS = 128
PROBE_SEED = 0
PREDICTED_WITHIN = 0.05
"""The share by which a measured error may differ from the predicted one, beside the rounding of the weights."""
ROUNDING = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""The relative error that casting a layer's weights to a dtype may add."""


def probe_errors(
    source: SourceAttention, attention: LatentAttention, tensors: dict[str, Tensor], implementation: str
) -> tuple[float, float]:
    """Return the measured and the predicted relative error of a converted layer's output.

    Both are root mean squares relative to the source attention's output, on `PROBE_TOKENS` seeded Gaussian states that
    are scaled like the layer's normed input. The measured one is that of the module, with its weights as they will be
    saved; the predicted one is that of the layer's equations, in float64, with the factorization's own tensors. Modules
    compute in float32 here, or in float64 if that is the model's dtype.

    Args:
        source: The attention that was converted.
        attention: The module that takes its place.
        tensors: The layer's tensors before they were cast, by their names in the module.
        implementation: The attention implementation to run, see `LayerSource.implementation`.
    """
    # Weights of a model in float64 may be out of the range of float32.
    gain = source.input_gain.to(torch.promote_types(attention.o_proj.weight.dtype, torch.float32))
    generator = torch.Generator().manual_seed(PROBE_SEED)
    states = torch.randn(1, PROBE_TOKENS, len(gain), generator=generator).to(gain) * gain
    positions = torch.arange(PROBE_TOKENS, device=gain.device)[None]
    table = rotary_table(attention.rotary, states, positions, attention.rotary_keywords)
    before = _output(source.module, states, table, implementation)
    size = before.norm()
    predicted = reference_attention(
        attention.geometry, tensors, states, source.pairs.cos_sin(table), source.eps, LATENT_NORM_EPS
    )
    errors = [
        (after - before).norm() / (size if size > 0 else 1.0)
        for after in (_output(attention, states, table, implementation), predicted)
    ]
    return float(errors[0]), float(errors[1])


def _output(module: nn.Module, states: Tensor, table: tuple[Tensor, Tensor], implementation: str) -> Tensor:
    """Return an attention's output in float64, computed in the dtype of the states without dropout or window."""
    shared = [getattr(module, name) for name in ("config", "rotary") if hasattr(module, name)]
    clone: Any = copy.deepcopy(module, {id(part): part for part in shared}).to(states.dtype).eval()
    clone.config = copy.copy(clone.config)
    clone.config._attn_implementation = implementation
    clone.sliding_window = None
    mask = None  # With `sdpa` that is a causal one.
    if implementation == "eager":
        size, lowest = states.shape[1], torch.finfo(states.dtype).min
        mask = torch.full((1, 1, size, size), lowest, dtype=states.dtype, device=states.device).triu(1)
    return clone(states, position_embeddings=table, attention_mask=mask)[0].double()


def check_errors(layer: int, measured: float, predicted: float, dtype: torch.dtype) -> None:
    """Refuse a converted layer that computes something other than its factorization says.

    Args:
        layer: The layer's index.
        measured: The measured error that `probe_errors` returned.
        predicted: The predicted error that `probe_errors` returned.
        dtype: The dtype of the layer's weights.

    Raises:
        VerificationError: The two errors differ by more than `PREDICTED_WITHIN` and the rounding of the dtype.
    """
    allowed = PREDICTED_WITHIN * predicted + ROUNDING[dtype]
    if not abs(measured - predicted) <= allowed:  # The negation also catches NaN.
        raise VerificationError(
            f"verify: the attention of layer {layer} has an output error of {measured:.3g}, but its factorization "
            f"predicts {predicted:.3g} (allowed difference: {allowed:.2g})."
        )
