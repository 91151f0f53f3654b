"""A model that is read one decoder layer at a time, wherever its weights lie."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import PreTrainedModel

from optimum_mla.core.errors import UnreadableModelError, UnsupportedModelError, first_line
from optimum_mla.families.project import SourceAttention, source_attention
from optimum_mla.families.spec import layer_type
from optimum_mla.models.checks import check_convertible, check_finite, config_of
from optimum_mla.models.family_table import is_converted
from optimum_mla.nn import LatentAttention
from optimum_mla.stack import bare_copy, by_layer_type

M = TypeVar("M", bound=nn.Module)


class LayerSource:
    """Gives the layers of a model one after the other, each as the decoder layer of its family.

    The model may be in memory, be a traced one, or be spread over devices and offloaded to the disk by a `device_map`.
    Layers share the weights that are in memory, and read those that are not. Nothing that is done to them changes the
    model. Only the last layer is kept, in each dtype that was asked for, so memory does not grow with the depth.

    Args:
        model: A source model, one of which other layers are converted, or one that `optimum_mla.trace` returned.
        quantized: Whether its weights may be quantized. Layers are then given with the weights that these stand for.

    Attributes:
        model: The model.
        config: Its config.
        family: Its family.
        embedding: Its token embedding.
        rotary: Its rotary embedding.
        device: The device of the embedding, to which layers are moved.
        dtype: The dtype of the embedding.

    Raises:
        UnsupportedModelError: The model cannot be converted; see `check_convertible`.
        CorruptWeightsError: A weight is NaN or infinite.
    """

    def __init__(self, model: PreTrainedModel | GraphModule, quantized: bool = False) -> None:
        self.model, self.config, self.family = model, config_of(model), check_convertible(model, quantized)
        spec = self.family.spec
        self.embedding = self._part(f"{spec.base}.{spec.embedding}")
        weight = next(self.embedding.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        # A rotary embedding that depends on the length remembers the longest pass, so it is copied with its buffers.
        self.rotary = copy.deepcopy(self._part(spec.rotary_path)).to(self.device)
        self._kept: dict[torch.dtype | None, tuple[int, nn.Module]] = {}
        self._skeleton: nn.Module | None = None

    @property
    def num_layers(self) -> int:
        """Return the number of decoder layers."""
        return int(self.config.num_hidden_layers)

    def layer(self, index: int, dtype: torch.dtype | None = None) -> nn.Module:
        """Return a decoder layer in evaluation mode, with the attention that `implementation` names.

        Args:
            index: Index of the layer.
            dtype: The dtype of its weights; None keeps their own.

        Raises:
            CorruptWeightsError: A weight that was read is NaN or infinite.
        """
        self._kept = {name: kept for name, kept in self._kept.items() if kept[0] == index}
        if dtype not in self._kept:
            own = self._decoder_layer(index) if dtype is None else bare_copy(self.layer(index)).to(dtype)
            self._kept[dtype] = index, own
        return self._kept[dtype][1]

    def attention(self, index: int) -> SourceAttention:
        """Return the source attention of a layer, which holds float64 copies of the weights that were asked for.

        Raises:
            UnsupportedModelError: A projection is not an `nn.Linear`, or the spec names a module that the model lacks.
        """
        return source_attention(self.family.spec, self.layer(index), self.config, index, self.rotary)

    def embed(self, ids: Tensor) -> Tensor:
        """Return what enters the first layer for token ids [N, L], which is [N, L, d]."""
        return self.family.spec.embedded(self.config, self.embedding(ids))

    def table(self, index: int, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin as a layer gets them, [1, L, W] each, at positions [1, L], in the dtype of `like`."""
        return self.rotary(like, positions, **by_layer_type(self.rotary, layer_type(self.config, index)))

    @property
    def implementation(self) -> str:
        """Return the attention implementation with which layers run: the fastest that computes what the family does."""
        return "sdpa" if self.family.source_model._supports_sdpa else "eager"

    def final_norm(self) -> nn.Module:
        """Return the norm after the last layer."""
        return self._part(f"{self.family.spec.base}.{self.family.spec.norm}").to(self.device)

    def head(self) -> nn.Module:
        """Return the language-model head."""
        return self._part(self.family.spec.head).to(self.device)

    def _decoder_layer(self, index: int) -> nn.Module:
        path = self.family.spec.layer_path(index)
        layer = self._from_skeleton(path, index) if isinstance(self.model, GraphModule) else self._part(path)
        return for_walking(layer, self.implementation).to(self.device)

    def _part(self, path: str) -> Any:
        """Return a copy of a module of the model, after a check of those weights that were not in memory."""
        module = self.model.get_submodule(path)
        with reading_weights():
            copied = bare_copy(module)
        for (name, kept), read in zip(module.named_parameters(), copied.parameters(), strict=True):
            if kept.is_meta:
                check_finite(f"{path}.{name}", read)
        return copied

    def _from_skeleton(self, path: str, index: int) -> nn.Module:
        """Return a decoder layer of the family's own class with the weights of a traced model, which has none."""
        if self._skeleton is None:
            made: Any = self.family.model if is_converted(self.config) else self.family.source_model
            with torch.device("meta"):
                self._skeleton = made(self.config)
        layer = copy.deepcopy(self._skeleton.get_submodule(path))
        try:
            layer.load_state_dict(bare_copy(self.model.get_submodule(path)).state_dict(), assign=True)
        except RuntimeError as error:
            raise UnsupportedModelError(
                f"model: layer {index} differs from its config: {first_line(error)}."
            ) from error
        attention = layer.get_submodule(self.family.spec.attention)
        if isinstance(attention, LatentAttention):
            object.__setattr__(attention, "rotary", self.rotary)
        return layer


@contextmanager
def reading_weights() -> Iterator[None]:
    """Turn an error of the file system, or of a file of weights, into one that says so.

    Raises:
        UnreadableModelError: Weights that were on the disk could not be read.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UnreadableModelError(
            f"model: its weights could not be read: {first_line(error)}. Check that its files are still whole."
        ) from error


def for_walking(module: M, implementation: str) -> M:
    """Put a module that is not part of a model into evaluation mode, with an attention implementation; return it."""
    for part in module.eval().modules():
        config = getattr(part, "config", None)
        if config is not None:
            config = copy.copy(config)
            config._attn_implementation = implementation  # type: ignore[union-attr]
            part.config = config
    return module
