"""The names of the linear layers of each attention, by what they do. Other rooms ask these tables for names."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Latent:
    """The modules around a latent.

    Attributes:
        down: The linear layer that writes it. Rows after the latent's rank write the cached rotary key.
        up: The linear layers that read it and whose rows are heads.
        norm: The norm after `down`, or None.
        rotary: The linear layer that makes a rotary key from it, or None.
    """

    down: str
    up: tuple[str, ...]
    norm: str | None = None
    rotary: str | None = None

    @property
    def readers(self) -> tuple[str, ...]:
        """The linear layers that read the latent."""
        return self.up if self.rotary is None else (*self.up, self.rotary)


@dataclass(frozen=True)
class Roles:
    """Which modules of an attention do what. A layer need not have all of them.

    Attributes:
        latents: The latents that are cached.
        queries: The linear layers whose outputs are the query heads.
        query_latent: The latent that queries are made from, or None.
        output: The linear layer after the attention.
    """

    latents: tuple[Latent, ...]
    queries: tuple[str, ...]
    query_latent: Latent | None = None
    output: str = "o_proj"

    @property
    def by_heads(self) -> tuple[str, ...]:
        """The linear layers whose rows are heads."""
        return (*self.queries, *dict.fromkeys(name for latent in self.latents for name in latent.up))


DECOUPLED = Roles(
    latents=(Latent("kv_a_proj_with_mqa", ("kv_b_proj",), "kv_a_layernorm", "k_rope_proj"),),
    queries=("q_proj", "q_b_proj"),
    query_latent=Latent("q_a_proj", ("q_b_proj",), "q_a_layernorm"),
)
FULL = Roles(
    latents=(
        Latent("kv_a_proj", ("k_b_proj", "v_b_proj")),
        Latent("k_a_proj", ("k_b_proj",)),
        Latent("v_a_proj", ("v_b_proj",)),
    ),
    queries=("q_proj",),
)
_LATENTS = (*DECOUPLED.latents, *FULL.latents)
DOWN_PROJECTIONS = tuple(latent.down for latent in _LATENTS)
"""Linear layers that write a cached latent, in all forms of the attention."""
UP_PROJECTIONS = tuple(dict.fromkeys(name for latent in _LATENTS for name in latent.readers))
"""Linear layers that read a cached latent, in all forms of the attention."""
LATENT_PROJECTIONS = DOWN_PROJECTIONS + UP_PROJECTIONS
