"""Estimates of the time and the memory of a conversion, before it starts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from optimum_mla.calibrate.sensitivity import SENSITIVITY_TOKENS, STREAM_NUMBERS
from optimum_mla.convert.first_pass import ALLOCATION_WINDOWS
from optimum_mla.convert.transformation import MLATransformation
from optimum_mla.core.geometry import ModelGeometry
from optimum_mla.models.family_table import family_of

LIBRARIES_BYTES = 450e6
"""Resident memory of a process that has imported torch and Transformers and does nothing."""
FACTOR_COPIES = 6
"""Number of float64 matrices of the size of [W_K ; W_V], or of the inputs' moments, that are in memory at once."""
LOGIT_COPIES = 3
"""Number of float32 copies of a batch's logits that the perplexity holds at once."""
STATE_COPIES = 4
"""Number of copies of the hidden states of all calibration tokens that a walk holds in float32."""
WALKED = 7.6
"""Cost of a calibration token with its walk, moments and refits, in passes through a layer's linear maps."""
FIRST_PASS = 4.1
"""Cost, in such passes, of a token of the pass in which the choices for all layers together are made."""
EVALUATED = 3.3
"""Cost, in such passes, of a token that is run through both models for the perplexity alone."""
SOLUTIONS = 9
"""Eigenproblems of the size of the hidden state that cost what the factorizations of a layer cost.

These four were fitted to conversions of SmolLM2-135M on one core.
"""
PLAIN_SECONDS = 0.5
"""Seconds per layer of a conversion without calibration."""
PROBE_TOKENS = 512
"""Tokens in the longest window that the probe takes through a layer."""
PROBE_SIZE = 768
"""Size of the eigenproblem that the probe solves, or that of the hidden state if it is smaller."""
PROBE_SECONDS = 0.3
"""Seconds for which the probe repeats each of its measurements; one run is made in any case."""


@dataclass(frozen=True)
class Probe:
    """How fast a machine does the work of conversions of one model, which was measured in a few seconds.

    Attributes:
        token_seconds: Seconds that the linear maps of a decoder layer take for a token of a window, in float32.
        solution_seconds: Seconds of an eigenproblem of the size of the hidden state, in float64.
    """

    token_seconds: float
    solution_seconds: float


@dataclass(frozen=True)
class Work:
    """The work of a conversion that takes time.

    Attributes:
        layers: Number of layers to convert.
        tokens: Calibration tokens that are run through the layers; 0 without a walk.
        first_tokens: Tokens of the pass in which the choices for all layers together are made.
        factorizes: Whether weights are factorized with calibration.
        evaluated_tokens: Tokens that are run through both models for the perplexity alone.
        compared_tokens: Tokens of the first pass that are also run through the layers behind each replaced one.
    """

    layers: int
    tokens: int = 0
    first_tokens: int = 0
    factorizes: bool = False
    evaluated_tokens: int = 0
    compared_tokens: int = 0


def probe(config: PreTrainedConfig, device: torch.device, window_tokens: int = PROBE_TOKENS) -> Probe:
    """Measure how fast this machine is, with the linear maps of a decoder layer of random weights.

    Args:
        config: The config of the source model.
        device: The device of the conversion.
        window_tokens: Tokens in a calibration window.
    """
    family = family_of(config)
    with torch.device("meta"):
        layer: Any = family.source_model(config).get_submodule(family.spec.layer_path(0))
    layer = layer.to(torch.float32).to_empty(device=device)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    tokens = min(window_tokens, PROBE_TOKENS)
    maps = [part for part in layer.modules() if isinstance(part, nn.Linear)]
    states = {part.in_features: torch.randn(tokens, part.in_features, device=device) for part in maps}
    size = min(config.hidden_size, PROBE_SIZE)
    square = torch.randn(size, size, dtype=torch.float64, device=device)
    square = square @ square.T

    @torch.no_grad()
    def walked() -> None:
        sums = [part(states[part.in_features]).sum() for part in maps]
        torch.stack(sums).sum().item()  # Reading a number waits for the device.

    passed = seconds_of(walked)
    solved = seconds_of(lambda: torch.linalg.eigvalsh(square).sum().item() and None)
    return Probe(passed / tokens, solved * (config.hidden_size / size) ** 3)


def work_of(transformation: MLATransformation, layers: int, evaluation: Tensor | None = None) -> Work:
    """Return the work of a conversion.

    Args:
        transformation: The transformation, with its calibration tokens or statistics.
        layers: Number of layers to convert.
        evaluation: Token ids on which both perplexities are measured apart from the calibration, or None.
    """
    given, evaluated = transformation.calibration, 0 if evaluation is None else evaluation.numel()
    if given is None or not transformation.needs_calibration:
        return Work(layers, evaluated_tokens=evaluated)
    tokens = given.numel() if isinstance(given, Tensor) else 0
    first, compared = 0, 0
    if isinstance(given, Tensor) and (transformation.rank_allocation != "uniform" or transformation.shared_rope):
        first = min(ALLOCATION_WINDOWS, len(given)) * given.shape[1]
        compares = transformation.rank_allocation == "error" or transformation.shared_rope
        compared = min(SENSITIVITY_TOKENS, first) if compares else 0
    return Work(layers, tokens, first, transformation.factorization == "calibrated", evaluated, compared)


def seconds_of(work: Callable[[], None]) -> float:
    """Return the least seconds that some work takes, after one run that is not counted if it is short."""
    start = time.perf_counter()
    work()
    first = time.perf_counter() - start
    if first > PROBE_SECONDS:
        return first
    times: list[float] = []
    while sum(times) < PROBE_SECONDS:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def conversion_seconds(speed: Probe, work: Work, processes: int = 1) -> float:
    """Return about how long a conversion with its measurements takes.

    Args:
        speed: The speed of the machine.
        work: The work of the conversion.
        processes: Number of processes that share the passes; all of them solve the eigenproblems.
    """
    passes = WALKED * work.tokens + FIRST_PASS * work.first_tokens + EVALUATED * work.evaluated_tokens
    passes += work.layers / 2 * work.compared_tokens
    solutions = SOLUTIONS * (1 if not work.first_tokens else 2) if work.factorizes else 0
    return work.layers * (PLAIN_SECONDS + passes / processes * speed.token_seconds + solutions * speed.solution_seconds)


def conversion_memory(
    config: PreTrainedConfig,
    geometry: ModelGeometry,
    weight_bytes: int,
    calibration_tokens: int,
    evaluation_batch_tokens: int = 0,
    offloaded: bool = False,
    compared_tokens: int = 0,
) -> int:
    """Return an estimate of the highest memory of a calibrated conversion on the CPU, in bytes.

    It adds up the libraries, the weights that are in memory, the hidden states of the calibration tokens, and the
    larger of the work on one layer and the logits of the evaluation.

    Args:
        config: The config of the source model.
        geometry: Shape of the source model.
        weight_bytes: Bytes of the model's weights.
        calibration_tokens: Number of calibration tokens.
        evaluation_batch_tokens: Number of tokens in one batch of the evaluation.
        offloaded: Whether the layers stay on the disk, so that two of them are in memory at once.
        compared_tokens: Number of tokens whose predictions are compared with each layer replaced.
    """
    first = geometry.layers[0]
    layer = first.source_parameters + 3 * first.hidden_size * getattr(config, "intermediate_size", 0)
    embeddings = (1 if config.tie_word_embeddings else 2) * config.vocab_size * first.hidden_size
    everything = len(geometry.layers) * layer + embeddings
    attention = sum(one.source_parameters for one in geometry.layers)
    in_memory = embeddings + 2 * layer if offloaded else everything + attention  # both kinds of attention
    states = STATE_COPIES * 4 * calibration_tokens * first.hidden_size
    streams = 4 * min(STREAM_NUMBERS, len(geometry.layers) * compared_tokens * first.hidden_size)
    wide = max(2 * first.num_key_value_heads * first.head_dim, first.hidden_size)
    work = 4 * layer + FACTOR_COPIES * 8 * wide * first.hidden_size
    logits = LOGIT_COPIES * evaluation_batch_tokens * config.vocab_size * 4
    return int(LIBRARIES_BYTES + weight_bytes * in_memory / everything + max(states + streams + work, logits))
