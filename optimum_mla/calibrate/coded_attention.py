"""The attention of a source layer as it is when old tokens are read from codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from optimum_mla.cache.codec_layer import ExactTokens
from optimum_mla.families.project import SourceAttention
from optimum_mla.ops.blockwise import capped
from optimum_mla.ops.rotary import Rotation, rotate


class CodedAttention(nn.Module):
    """Attention over whole windows in which every token reads old ones from codes, as tokens do that follow a prompt.

    Each query reads the first tokens of its window and the newest ones before it exactly.

    Args:
        source: The layer's attention.
        reread: Returns the vectors [key ; value] that old tokens are read as, [B, L, w], for those that they have,
            before the keys' rotation. A codec would return what its codes stand for.
        exact: Which tokens are never read from codes.
        mask: Whether a token attends to another, [1, 1, L, L] boolean.
        dtype: The dtype to compute in.
    """

    def __init__(
        self,
        source: SourceAttention,
        reread: Callable[[Tensor], Tensor],
        exact: ExactTokens,
        mask: Tensor,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.source, self.reread, self.exact, self.mask = source, reread, exact, mask
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
        vectors = torch.cat([part.transpose(1, 2).flatten(2) for part in (key, value)], dim=-1)
        again = self.reread(vectors).to(key.dtype)
        old_key, old_value = (
            part.transpose(1, 2) for part in again.unflatten(-1, (2, g.num_key_value_heads, -1)).unbind(2)
        )
        rotation = Rotation(*(part.unsqueeze(1) for part in source.pairs.cos_sin(position_embeddings)))
        query = rotate(query, rotation).unflatten(1, (g.num_key_value_heads, -1))  # [B, G, H/G, L, D]
        places = torch.arange(hidden_states.shape[1], device=hidden_states.device)
        old = (places[:, None] - places >= self.exact.recent) & (places >= self.exact.sinks)
        logits = [query @ rotate(keys, rotation).unsqueeze(2).mT for keys in (key, old_key)]
        scaled = capped(torch.where(old, logits[1], logits[0]) * g.head_dim**-0.5, g.logit_cap)
        weights = scaled.masked_fill(~self.mask[:, :, None], float("-inf")).softmax(-1)
        context = (weights * old) @ old_value.unsqueeze(2) + (weights * ~old) @ value.unsqueeze(2)
        return (self.o_proj(context.flatten(1, 2).transpose(1, 2).flatten(2)), None)
