"""The estimate of the memory of a conversion, before it starts."""

from __future__ import annotations

from transformers import PreTrainedConfig

from optimum_mla.calibrate.sensitivity import SENSITIVITY_TOKENS, STREAM_NUMBERS
from optimum_mla.measure.quality import TOKENS_PER_BATCH
from optimum_mla.models.family_table import family_of
from optimum_mla.models.layers import model_geometry

LIBRARIES_BYTES = 450e6
"""Resident memory of a process that has imported torch and Transformers and does nothing."""
FACTOR_COPIES = 6
"""Number of float64 matrices of the size of [W_K ; W_V], or of the inputs' moments, that are in memory at once."""
LOGIT_COPIES = 3
"""Number of float32 copies of a batch's logits that the perplexity holds at once."""
STATE_COPIES = 4
"""Number of copies of the hidden states of all calibration tokens that a walk holds in float32."""


def conversion_memory(
    config: PreTrainedConfig, weight_bytes: int, calibration_tokens: int, evaluation_tokens: int, offloaded: bool
) -> int:
    """Return an estimate of the highest memory of a conversion on the CPU, in bytes.

    It adds up the libraries, the weights that are in memory, the hidden states of the calibration tokens, and the
    larger of the work on one layer and the logits of the evaluation.

    Args:
        config: The config of the source model.
        weight_bytes: Bytes of the model's weights.
        calibration_tokens: Number of tokens that are run through the layers; 0 with statistics or no calibration.
        evaluation_tokens: Number of tokens on which perplexities are measured, of which a batch is in memory at once.
        offloaded: Whether the layers stay on the disk, so that two of them are in memory at once.
    """
    layers = model_geometry(family_of(config).spec, config).layers
    first = layers[0]
    layer = first.source_parameters + 3 * first.hidden_size * getattr(config, "intermediate_size", 0)
    embeddings = (1 if config.tie_word_embeddings else 2) * config.vocab_size * first.hidden_size
    everything = len(layers) * layer + embeddings
    attention = sum(one.source_parameters for one in layers)
    in_memory = embeddings + 2 * layer if offloaded else everything + attention  # both kinds of attention
    states = STATE_COPIES * 4 * calibration_tokens * first.hidden_size
    compared = min(SENSITIVITY_TOKENS, calibration_tokens)
    streams = 4 * min(STREAM_NUMBERS, len(layers) * compared * first.hidden_size)
    wide = max(2 * first.num_key_value_heads * first.head_dim, first.hidden_size)
    work = 4 * layer + FACTOR_COPIES * 8 * wide * first.hidden_size
    logits = LOGIT_COPIES * min(evaluation_tokens, TOKENS_PER_BATCH) * config.vocab_size * 4
    return int(LIBRARIES_BYTES + weight_bytes * in_memory / everything + max(states + streams + work, logits))
