"""Greedy continuations that nothing but the model's logits decides."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, PreTrainedModel

from optimum_mla.measure.quality import evaluating
from optimum_mla.stack import CACHE_ARGUMENT


@torch.no_grad()
def greedy(
    model: PreTrainedModel,
    ids: Tensor,
    new_tokens: int,
    end: int | list[int] | None = None,
    cache: Cache | None = None,
    use_cache: bool = True,
    mask: Tensor | None = None,
) -> Any:
    """Continue token ids by the likeliest token at each step, and return all that `generate` gives, with its logits.

    `generate` fills the fields that a generation config leaves out with those of the model's own, which may end a text
    (`eos_token_id`, `stop_strings`, `max_time`), move the logits (`repetition_penalty`, `suppress_tokens`, ...) or name
    another cache. So the model's own is set aside meanwhile.

    Args:
        model: A causal language model.
        ids: Token ids, [B, T].
        new_tokens: Number of tokens to add.
        end: Tokens that end a text before that, or None.
        cache: An empty cache, or None for that which the model makes for itself.
        use_cache: Whether there is a cache at all.
        mask: Which of the tokens are no padding, [B, T]; None stands for all.
    """
    config = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=end,
        pad_token_id=0,
        use_cache=use_cache,
        return_dict_in_generate=True,
        output_logits=True,
    )
    given: dict[str, Any] = {} if cache is None else {CACHE_ARGUMENT: cache}
    given["attention_mask"] = torch.ones_like(ids) if mask is None else mask
    generating: Any = model
    own, generating.generation_config = generating.generation_config, GenerationConfig()
    try:
        with evaluating(model):
            return generating.generate(ids, generation_config=config, **given)
    finally:
        generating.generation_config = own
