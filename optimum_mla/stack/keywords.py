"""The keywords that a model's or an attention's `forward` may be given. What nobody knows is an error."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import TransformersKwargs

from optimum_mla.core.errors import UnknownKeywordError
from optimum_mla.stack.cache_argument import ACCEPTED_NAMES

HANDLED_BY_DECORATORS = ("return_dict",)
"""Keywords that Transformers' own decorators around a `forward` take out before it runs."""
HANDED_ON_BY_GENERATE = ("tokenizer", "assistant_tokenizer")
"""Arguments of `generate`, which uses them itself and hands them to every `forward` all the same."""
GIVEN_BY_THE_ATTENTION = ("module", "query", "key", "value", "dropout", "scaling", "sliding_window")
"""Arguments of an attention function that the attention module sets itself, so that nobody else may."""


@functools.lru_cache(maxsize=1024)
def parameter_names(function: Callable[..., Any]) -> frozenset[str]:
    """Return the names of a function's arguments, without `*args` and `**kwargs`."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return frozenset(name for name, p in inspect.signature(function).parameters.items() if p.kind not in kinds)


@functools.cache
def shared_keywords() -> frozenset[str]:
    """Return the keywords that Transformers hands through its models: those of its attention functions and losses.

    A model passes what it does not use itself on to its layers, so all of these reach every attention.
    """
    names = {*HANDLED_BY_DECORATORS, *HANDED_ON_BY_GENERATE} | set(TransformersKwargs.__annotations__)
    names |= set(FlashAttentionKwargs.__annotations__) | parameter_names(ForCausalLMLoss)
    for function in ALL_ATTENTION_FUNCTIONS.values():
        names |= parameter_names(function)
    return frozenset(names) - set(ACCEPTED_NAMES) - set(GIVEN_BY_THE_ATTENTION)


def changes_attention(keywords: Mapping[str, Any]) -> bool:
    """Return whether a keyword is set that only an attention function can act on, such as `softcap` or `cu_seq_lens_q`.

    Args:
        keywords: What an attention module was given beside its own arguments.
    """
    return any(value is not None and name in attention_keywords() for name, value in keywords.items())


@functools.cache
def attention_keywords() -> frozenset[str]:
    """Return the keywords whose effect is inside the attention functions."""
    names = set(FlashAttentionKwargs.__annotations__)
    for function in ALL_ATTENTION_FUNCTIONS.values():
        names |= parameter_names(function)
    elsewhere = {"attention_mask", "position_ids", "is_causal", "output_attentions", *ACCEPTED_NAMES}
    return frozenset(names) - elsewhere - set(GIVEN_BY_THE_ATTENTION)


def forward_keywords(*functions: Callable[..., Any]) -> frozenset[str]:
    """Return every keyword that the given `forward`s of Transformers' classes and all attention functions take."""
    own: set[str] = set()
    for function in functions:
        own |= parameter_names(function)
    return shared_keywords() | (own - {"self"})


def check_keywords(
    keywords: Mapping[str, Any], known: Iterable[str], owner: str, attention_implementation: str | None
) -> None:
    """Refuse a keyword that nothing will use.

    Args:
        keywords: What a caller gave.
        known: What the callee knows.
        owner: The callee's name, for the message.
        attention_implementation: The attention function in use. One that a user registered may take further keywords.

    Raises:
        UnknownKeywordError: With the keyword's name.
    """
    unknown = [name for name in keywords if name not in known]
    if not unknown:
        return
    function = ALL_ATTENTION_FUNCTIONS.get(attention_implementation)
    further = parameter_names(function) if function is not None else frozenset()
    unknown = [name for name in unknown if name not in further]
    if unknown:
        raise UnknownKeywordError(
            f"{owner}: got the keyword {', '.join(unknown)}, which neither it nor the attention function "
            f"{attention_implementation} takes. Leave it out; a cache is passed as {' or '.join(ACCEPTED_NAMES)}."
        )
