"""The names of the linear layers that write or read a latent, in all forms of the attention."""

from __future__ import annotations

DOWN_PROJECTIONS = ("kv_a_proj_with_mqa", "kv_a_proj", "k_a_proj", "v_a_proj")
"""Linear layers that write a latent; the first one writes the cached rotary key too."""
UP_PROJECTIONS = ("kv_b_proj", "k_b_proj", "v_b_proj", "k_rope_proj")
"""Linear layers that read a latent."""
LATENT_PROJECTIONS = DOWN_PROJECTIONS + UP_PROJECTIONS
