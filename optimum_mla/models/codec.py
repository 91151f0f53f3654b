"""The codec of a whole model, which is kept in a small file of its own, and the caches that it makes for the model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from optimum_mla.cache.codec_layer import CodecCache, CodecLayer, ExactTokens
from optimum_mla.cache.positions import CachedPositions
from optimum_mla.codec.layout import Layout
from optimum_mla.codec.vectors import VectorCodec
from optimum_mla.core.errors import UnreadableModelError, UnsupportedModelError, first_line
from optimum_mla.families.project import pair_table
from optimum_mla.families.spec import AttentionSpec, layer_type
from optimum_mla.models.checks import config_of
from optimum_mla.models.family_table import family_of
from optimum_mla.ops.rotary import PairTable
from optimum_mla.stack import bare_copy, by_layer_type, first_positions_table, rotary_dims, rotary_table

CODEC_FILE = "latent_codec.safetensors"
"""Name of the file of a codec in its folder."""
FORMAT = 1
PROBE_TOLERANCE = 0.3
"""Largest relative difference of a probe, which quantized weights stay below and those of another model do not."""


@dataclass(frozen=True)
class ModelCodec:
    """The codecs of a model's layers of full attention.

    The model's weights are left alone. A cache that this makes keeps old tokens as codes, and reads prompts, the first
    and the newest tokens exactly.

    Attributes:
        layers: The codec of each layer that has one, by the index of the layer.
        probes: What the key and value projections of these layers make of a fixed vector, [2·G·D] each, by which
            another model is told.
        model_type: The `model_type` of the model.
        exact: Which tokens are never read from codes.
    """

    layers: dict[int, VectorCodec]
    probes: dict[int, Tensor]
    model_type: str
    exact: ExactTokens = field(default_factory=ExactTokens)

    def save(self, folder: str | Path) -> Path:
        """Write the codec to `folder`/latent_codec.safetensors, and return the path of the file."""
        tensors = {
            f"layers.{index}.{name}": tensor.contiguous()
            for index, codec in self.layers.items()
            for name, tensor in {**codec.tensors, "probe": self.probes[index]}.items()
        }
        described = {
            "format": FORMAT,
            "model_type": self.model_type,
            "exact": asdict(self.exact),
            "layouts": {str(index): asdict(codec.layout) for index, codec in self.layers.items()},
        }
        path = Path(folder) / CODEC_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.with_suffix(".partial")
        save_file(tensors, written, metadata={"latent_codec": json.dumps(described)})
        written.replace(path)
        return path

    @classmethod
    def load(cls, folder: str | Path) -> ModelCodec:
        """Return the codec that `save` wrote.

        Raises:
            UnreadableModelError: There is no such file, or it is damaged or of another format.
        """
        path = Path(folder) / CODEC_FILE
        try:
            with safe_open(path, framework="pt") as file:
                described = json.loads((file.metadata() or {})["latent_codec"])
                if described["format"] != FORMAT:
                    raise UnreadableModelError(
                        f"codec: {path} has format {described['format']}, allowed: {FORMAT}. Write it again with this "
                        "version."
                    )
                layers, probes = {}, {}
                for name, layout in described["layouts"].items():
                    parts = ("latent_down", "latent_up", "centre", "weight", "probe")
                    tensors = {part: file.get_tensor(f"layers.{name}.{part}") for part in parts}
                    probes[int(name)] = tensors.pop("probe")
                    layers[int(name)] = VectorCodec(Layout.from_dict(layout), **tensors)
            return cls(layers, probes, described["model_type"], ExactTokens(**described["exact"]))
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise UnreadableModelError(f"codec: {path} could not be read: {first_line(error)}.") from error

    @property
    def bytes_per_token(self) -> int:
        """Return the bytes of the codes of one token in all layers."""
        return sum(codec.layout.bytes_per_token for codec in self.layers.values())

    def cache_bytes(self, tokens: int, itemsize: int = 2) -> int:
        """Return the bytes of the coded layers' cache of one sequence, its exact tokens included.

        Args:
            tokens: Number of tokens in the cache.
            itemsize: Bytes of a number of the model.
        """
        coded = self.exact.coded(tokens)
        numbers = sum(codec.width for codec in self.layers.values())
        return coded * self.bytes_per_token + (tokens - coded + self.exact.sinks) * numbers * itemsize

    def source_bytes(self, tokens: int, itemsize: int = 2) -> int:
        """Return the bytes of the same layers' cache of one sequence without codes."""
        return tokens * sum(codec.width for codec in self.layers.values()) * itemsize

    def check(self, model: PreTrainedModel) -> None:
        """Refuse a model that the codec was not fitted to.

        Raises:
            UnsupportedModelError: It is of another type, or its key and value projections make other vectors.
        """
        config = config_of(model)
        if config.model_type != self.model_type:
            raise UnsupportedModelError(
                f"model: got a {config.model_type}, allowed: the {self.model_type} of this codec"
            )
        for index, probe in self.probes.items():
            found = probe_of(model, index) if index < config.num_hidden_layers else torch.empty(0)
            # Written so that a difference which is not a number is too large as well.
            if found.shape != probe.shape or not (found - probe).norm() <= PROBE_TOLERANCE * probe.norm():
                raise UnsupportedModelError(
                    f"model: the keys and values of layer {index} are not those of the model that this codec was "
                    "fitted to. Load that model, or fit a codec to this one."
                )

    def make_cache(self, model: PreTrainedModel, offloading: bool = False) -> CodecCache:
        """Return an empty cache of codes for a model, to be given to `generate` or to the model as its cache.

        A hook at the model tells such a cache the positions of tokens and where padding is. It does nothing where the
        model runs with another cache or without one: then the model is what it was, to the last bit.

        Args:
            model: The model that the codec was fitted to, in any dtype.
            offloading: Keep the layers on the CPU between their turns (CUDA only).

        Raises:
            UnsupportedModelError: It is another model.
        """
        if getattr(model, "latent_codec", None) is not self:  # Otherwise this was checked when the model got it.
            self.check(model)
        config, spec = config_of(model), family_of(config_of(model)).spec
        rotary: Any = model.get_submodule(spec.rotary_path)
        base = model.get_submodule(spec.base)
        if not any(isinstance(hook, _TellsPositions) for hook in base._forward_pre_hooks.values()):
            base.register_forward_pre_hook(_TellsPositions(), with_kwargs=True)

        def layers(positions: Callable[[], CachedPositions]) -> Sequence[CacheLayerMixin]:
            own = DynamicCache(config=config).layers
            made: list[CacheLayerMixin] = []
            for index in range(config.num_hidden_layers):
                if index not in self.layers:
                    made.append(own[index] if index < len(own) else DynamicLayer())
                    continue
                of_type = layer_type(config, index)
                # Without its factor, dims that do not turn have a cosine of 1, as in the keys that the model caches.
                pairs = replace(pair_table(spec, config, index, rotary), scaling=1.0)
                order = pairs.order(rotary_dims(rotary, of_type, pairs.head_dim))
                turns = partial(_cos_sin, rotary, pairs, by_layer_type(rotary, of_type), positions)
                made.append(CodecLayer(self.layers[index], turns, order, self.exact))
            return made

        return CodecCache(layers, offloading)


def probe_of(model: PreTrainedModel, layer: int) -> Tensor:
    """Return what the key and value projections of a layer make of a fixed vector, in float32 on the CPU."""
    spec: AttentionSpec = family_of(config_of(model)).spec
    names = [spec.fused] if spec.fused is not None else [spec.key, spec.value]
    size = config_of(model).hidden_size
    vector = torch.randn(1, size, generator=torch.Generator().manual_seed(0))
    made = []
    with torch.no_grad():
        for name in names:
            projection: Any = model.get_submodule(f"{spec.attention_path(layer)}.{name}")
            tensors = [*projection.parameters(), *projection.buffers()]
            if any(tensor.is_meta for tensor in tensors):
                projection = bare_copy(projection)  # Weights that accelerate has offloaded are read.
                tensors = list(projection.parameters())
            like = next((one for one in tensors if one.is_floating_point()), vector)
            made.append(projection(vector.to(tensors[0].device, like.dtype))[0].float().cpu())
    return torch.cat(made)


def _cos_sin(
    rotary: nn.Module,
    pairs: PairTable,
    keywords: dict[str, Any],
    positions: Callable[[], CachedPositions],
    span: slice,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Return cos and sin of all pairs for the cached tokens in a slice, [1 or B, T, D/2] each, in float32."""
    like, held = torch.empty(0, dtype=torch.float32, device=device), positions()
    if held.consecutive:
        at = slice(held.start + span.start, held.start + span.stop)
        cos, sin = first_positions_table(rotary, like, at.stop, keywords)
        return pairs.cos_sin((cos[:, at], sin[:, at]))
    places = held.last(held.tokens, device)[:, span]
    return pairs.cos_sin(rotary_table(rotary, like, places, keywords))


class _TellsPositions:
    """The hook that tells a coded cache where the tokens of a pass stand."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for cache in (*args, *kwargs.values()):
            if isinstance(cache, CodecCache):
                tokens = next(
                    given
                    for given in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args)
                    if isinstance(given, Tensor)
                )
                cache.note(tokens.shape[1], kwargs.get("position_ids"), kwargs.get("attention_mask"))
