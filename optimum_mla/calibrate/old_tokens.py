"""The attention of a source layer, and how its output depends on what is read of old tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from optimum_mla.cache.codec_layer import ExactTokens
from optimum_mla.families.project import SourceAttention
from optimum_mla.ops.blockwise import capped
from optimum_mla.ops.rotary import Rotation, rotate


class OldTokensAttention(nn.Module):
    """The source's attention over whole windows, in which gradients of what old tokens are read as can be taken.

    A cache of codes reads the first tokens and the newest ones exactly, and all others from codes. Each query of a
    window is taken as one that follows a prompt, so a key and a value are read from codes by later queries only.

    Args:
        source: The layer's attention.
        exact: Which tokens are never read from codes.
        mask: Whether a token attends to another, [1, 1, L, L] boolean.
        dtype: The dtype to compute in.

    Attributes:
        logits: Products of the queries and keys of the last pass, [B, G, H/G, L, L].
        context: What its queries made of the values, [B, G, H/G, L, D].
        vectors: Keys before their rotation and values, [key ; value] of all heads, [B, L, 2·G·D].
    """

    logits: Tensor
    context: Tensor
    vectors: Tensor

    def __init__(self, source: SourceAttention, exact: ExactTokens, mask: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.source, self.mask = source, mask
        places = torch.arange(mask.shape[-1], device=mask.device)
        self._old = (places[:, None] - places >= exact.recent) & (places >= exact.sinks)
        output = {name.removeprefix("o_proj."): tensor for name, tensor in source.output().items()}
        width, inner = output["weight"].shape
        self.o_proj = nn.Linear(inner, width, bias="bias" in output, device=mask.device)
        self.o_proj.load_state_dict({name: tensor.to(dtype) for name, tensor in output.items()}, assign=True)
        self.requires_grad_(False)

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Return the output for the normed inputs of whole windows, [B, L, d]."""
        g, source = self.source.geometry, self.source
        query, key, value, _ = source.project(hidden_states)
        self.vectors = _flat(key, value)
        self._rotation = Rotation(*(part.unsqueeze(1) for part in source.pairs.cos_sin(position_embeddings)))
        query = rotate(query, self._rotation) * g.head_dim**-0.5
        self._query = query.unflatten(1, (g.num_key_value_heads, -1))
        self.logits = self._query @ rotate(key, self._rotation).unsqueeze(2).mT
        masked = capped(self.logits, g.logit_cap).masked_fill(~self.mask[:, :, None], float("-inf"))
        self._weights = masked.softmax(-1)
        self.context = self._weights @ value.unsqueeze(2)
        return (self.o_proj(self.context.flatten(1, 2).transpose(1, 2).flatten(2)), None)

    def gradients(self, of_logits: Tensor, of_context: Tensor) -> Tensor:
        """Return the gradients of what the last pass reads of old tokens in place of `vectors`, [B, L, 2·G·D].

        Args:
            of_logits: The gradients of `logits`.
            of_context: The gradients of `context`.
        """
        cos, sin = self._rotation
        key = ((of_logits * self._old).mT @ self._query).sum(2)
        value = ((self._weights * self._old).mT @ of_context).sum(2)
        return _flat(rotate(key, Rotation(cos, -sin)), value)


def _flat(key: Tensor, value: Tensor) -> Tensor:
    """Return keys and values [B, G, L, D] as [key ; value] of all heads, [B, L, 2·G·D]."""
    return torch.cat([part.transpose(1, 2).flatten(2) for part in (key, value)], dim=-1)
