"""The memory that is predicted for a conversion grows with what has to be in memory."""

from __future__ import annotations

from optimum_mla.measure.quality import TOKENS_PER_BATCH
from optimum_mla.pipeline.estimate import LIBRARIES_BYTES, conversion_memory
from tests.cases import SIZES, source_model


def test_the_memory_counts_the_states_and_the_logits_of_a_batch() -> None:
    config = source_model("llama").config
    without = conversion_memory(config, 1000, 0, 0, offloaded=False)
    states = conversion_memory(config, 1000, 10**6, 0, offloaded=False)
    logits = conversion_memory(config, 1000, 0, TOKENS_PER_BATCH, offloaded=False)
    assert LIBRARIES_BYTES < without < min(states, logits)
    # Four copies of the states of all tokens, and the streams of 2,048 tokens in each of three layers.
    assert states - without == (4 * 10**6 + 3 * 2048) * SIZES["hidden_size"] * 4
    assert logits > 3 * TOKENS_PER_BATCH * SIZES["vocab_size"] * 4
    assert conversion_memory(config, 1000, 0, 10 * TOKENS_PER_BATCH, offloaded=False) == logits


def test_the_memory_of_an_offloaded_model_does_not_grow_with_its_depth() -> None:
    found = {}
    for layers in (4, 8):
        model = source_model("llama", num_hidden_layers=layers)
        # As many bytes as there are parameters, so that the rounding of the share does not matter.
        weights = sum(p.numel() for p in model.parameters())
        found[layers] = [conversion_memory(model.config, weights, 0, 0, offloaded=off) for off in (True, False)]
    assert abs(found[4][0] - found[8][0]) < 2000  # norms are not counted as parts of a layer
    assert found[8][1] - found[4][1] > 20_000
