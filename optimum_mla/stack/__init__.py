"""The one room that knows how the installed Transformers names things.

Releases rename arguments: 5.24 calls the cache `cache`, earlier releases call it `past_key_values`. Everything here is
read from the signatures of Transformers' own classes, not from version numbers, so a third name works too.
"""

from optimum_mla.stack.cache_argument import (
    CACHE_ARGUMENT,
    cache_argument,
    cache_name,
    cache_of,
    cache_position,
    renamed_cache,
    takes_cache,
)
from optimum_mla.stack.foreign import check_cache, require_cache
from optimum_mla.stack.hooks import (
    bare_copy,
    is_offloaded,
    only_moves_inputs,
    remove_spread,
    returns_to_memory,
    spread,
)
from optimum_mla.stack.keywords import changes_attention, check_keywords, forward_keywords
from optimum_mla.stack.rotary import (
    FIXED_ROPE_TYPES,
    attention_scaling,
    by_layer_type,
    first_positions_table,
    kept_tables,
    rope_type,
    rotary_dims,
    rotary_table,
)
from optimum_mla.stack.tables import enter_class_names, share_checkpoint_names

__all__ = [
    "CACHE_ARGUMENT",
    "FIXED_ROPE_TYPES",
    "attention_scaling",
    "bare_copy",
    "by_layer_type",
    "cache_argument",
    "cache_name",
    "cache_of",
    "cache_position",
    "changes_attention",
    "check_cache",
    "check_keywords",
    "enter_class_names",
    "first_positions_table",
    "forward_keywords",
    "is_offloaded",
    "kept_tables",
    "only_moves_inputs",
    "remove_spread",
    "renamed_cache",
    "require_cache",
    "returns_to_memory",
    "rope_type",
    "rotary_dims",
    "rotary_table",
    "share_checkpoint_names",
    "spread",
    "takes_cache",
]
