"""Estimates of the time and the memory of a conversion, before it starts."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from optimum_mla.convert.run import ALLOCATION_WINDOWS
from optimum_mla.core.geometry import ModelGeometry
from optimum_mla.methods.base import MLATransformation

LIBRARIES_BYTES = 450e6
"""Resident memory of a process that has imported torch and Transformers and does nothing."""
FACTOR_COPIES = 6
"""Number of float64 matrices of the size of [W_K ; W_V] that are in memory while a layer is factorized."""
LOGIT_COPIES = 3
"""Number of float32 copies of a batch's logits that the perplexity holds at once."""
TOKEN_WORK = 2.2
"""Work on a calibration token in a layer, moments and refits included, in passes through the layer's linear maps."""
SOLUTIONS = 60
"""Multiply-adds of the factorizations of a layer in cubes of the hidden size.

Both were fitted to conversions of SmolLM2-135M on one core; float64 counts twice.
"""
PLAIN_SECONDS = 0.5
"""Seconds per layer of a conversion without calibration."""
RATE_SIZE = (512, 1024, 1024)
"""Sizes of the matrix product that is timed."""


def products_per_second(device: torch.device) -> float:
    """Return how many float32 multiply-adds this device does in a second, by timing matrix products for 0.1 s."""
    rows, inner, columns = RATE_SIZE
    left, right = torch.ones(rows, inner, device=device), torch.ones(inner, columns, device=device)
    (left @ right).sum().item()
    start, done = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < 0.1:
        (left @ right).sum().item()  # Reading a number waits for the device.
        done += rows * inner * columns
    return done / elapsed


def block_parameters(model: nn.Module) -> int:
    """Return how many parameters of a model are in its blocks, without the embeddings and the head."""
    everything = sum(parameter.numel() for parameter in model.parameters())
    outside = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}  # type: ignore[operator]
    return everything - sum(parameter.numel() for parameter in outside)


def conversion_seconds(
    model: PreTrainedModel, transformation: MLATransformation, evaluation: Tensor | None = None
) -> float:
    """Return about how long a conversion with its measurements takes on the model's device.

    Args:
        model: The source model.
        transformation: The transformation, with its calibration tokens.
        evaluation: Token ids on which both perplexities are measured, or None.
    """
    layers = model.config.num_hidden_layers
    rate, blocks = products_per_second(model.device), block_parameters(model)
    seconds = PLAIN_SECONDS * layers
    if transformation.needs_calibration and transformation.calibration is not None:
        windows, length = transformation.calibration.shape
        before = transformation.rank_allocation != "uniform" or transformation.shared_rope
        passed = length * (2 * windows + (min(windows, ALLOCATION_WINDOWS) if before else 0))
        seconds += TOKEN_WORK * passed * blocks / rate
        seconds += SOLUTIONS * layers * model.config.hidden_size**3 / rate
    if evaluation is not None:
        everything = sum(parameter.numel() for parameter in model.parameters())
        seconds += 2 * evaluation.numel() * everything / rate
    return seconds


def conversion_memory(
    config: PreTrainedConfig,
    geometry: ModelGeometry,
    weight_bytes: int,
    calibration_tokens: int,
    evaluation_batch_tokens: int = 0,
) -> int:
    """Return an estimate of the highest memory of a calibrated conversion on the CPU, in bytes.

    It adds up the libraries, the model, the converted attention, the hidden states of the calibration tokens, and the
    larger of the work on one layer and the logits of the evaluation.

    Args:
        config: The config of the source model.
        geometry: Shape of the source model.
        weight_bytes: Bytes of the model's weights.
        calibration_tokens: Number of calibration tokens.
        evaluation_batch_tokens: Number of tokens in one batch of the evaluation.
    """
    first = geometry.layers[0]
    states = 4 * calibration_tokens * first.hidden_size * 4
    keys = 2 * first.num_key_value_heads * first.head_dim * first.hidden_size * 8
    layer = 4 * (first.source_parameters + 3 * first.hidden_size * getattr(config, "intermediate_size", 0))
    logits = LOGIT_COPIES * evaluation_batch_tokens * config.vocab_size * 4
    attention = sum(one.source_parameters for one in geometry.layers)
    share = weight_bytes * attention // max(1, attention + config.vocab_size * first.hidden_size)
    return int(LIBRARIES_BYTES + weight_bytes + share + max(states + layer + FACTOR_COPIES * keys, logits))


def duration(seconds: float) -> str:
    """Return a duration in words that do not promise more than an estimate can, such as `about 3 minutes`."""
    if seconds < 10:
        return "a few seconds"
    if seconds < 90:
        return f"about {10 * round(seconds / 10)} seconds"
    if seconds < 5400:
        return f"about {round(seconds / 60)} minutes"
    return f"about {seconds / 3600:.1f} hours"
