"""Tracing of a decoder LLM into a `torch.fx.GraphModule` in which every attention is one `call_module` node."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Tracer
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from optimum_mla.families.spec import layer_type
from optimum_mla.families.verify import verify_family
from optimum_mla.models import family_of
from optimum_mla.stack import by_layer_type


class PositionIds(nn.Module):
    """A module that supplies position ids if the caller gives none."""

    def forward(self, hidden_states: Tensor, position_ids: Tensor | None) -> Tensor:
        """Return `position_ids`, or the positions 0 to S - 1 as [1, S] if they are None."""
        if position_ids is not None:
            return position_ids
        return torch.arange(hidden_states.shape[1], device=hidden_states.device)[None]


class CausalMask(nn.Module):
    """The attention mask of one layer type, made by Transformers for the model's attention implementation."""

    def __init__(self, config: Any, layer_type: str | None) -> None:
        super().__init__()
        self.config, self.layer_type = config, layer_type

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, position_ids: Tensor) -> Any:
        """Return the mask for a pass without a cache."""
        masks = create_masks_for_generate(self.config, hidden_states, attention_mask, None, position_ids)
        return masks[self.layer_type] if isinstance(masks, dict) else masks


class _Decoder(nn.Module):
    """A causal language model around the source's modules, whose `forward` can be traced.

    Its submodules have the same names as in the source model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        spec, config = family_of(model.config).spec, model.config
        self.spec, self.config = spec, config
        self.add_module(spec.base, model.get_submodule(spec.base))
        self.add_module(spec.head, model.get_output_embeddings())
        self.layer_types = [layer_type(config, layer) for layer in range(config.num_hidden_layers)]
        self.positions = PositionIds()
        for kind in dict.fromkeys(self.layer_types):
            self.add_module(f"mask_{kind or 'causal'}", CausalMask(config, kind))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        spec, base = self.spec, self.get_submodule(self.spec.base)
        rotary: Any = base.get_submodule(spec.rotary)
        layers: Any = base.get_submodule(spec.layers)
        hidden_states = spec.embedded(self.config, base.get_submodule(spec.embedding)(input_ids))
        position_ids = self.positions(hidden_states, position_ids)
        masks: dict[str | None, Any] = {}
        tables: dict[str | None, Any] = {}
        for kind in dict.fromkeys(self.layer_types):
            masks[kind] = self.get_submodule(f"mask_{kind or 'causal'}")(hidden_states, attention_mask, position_ids)
            keywords = by_layer_type(rotary, kind)
            same = next(iter(tables.values()), None) if not keywords else None  # The table of all types of layers.
            tables[kind] = rotary(hidden_states, position_ids, **keywords) if same is None else same
        for layer, kind in zip(layers, self.layer_types, strict=True):
            hidden_states = layer(
                hidden_states,
                attention_mask=masks[kind],
                position_ids=position_ids,
                position_embeddings=tables[kind],
            )
        normed = base.get_submodule(spec.norm)(hidden_states)
        return spec.logits(self.config, self.get_submodule(spec.head)(normed))


class _DecoderTracer(Tracer):
    """A tracer that traces into decoder layers and their dense feed-forward parts.

    Attentions, norms, mixtures of experts and the masks stay modules. The linear layers of a feed-forward part are
    nodes of their own, on which Optimum's transformations of linear layers work.
    """

    def __init__(self, layer_class: type[nn.Module], attentions: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layer_class, self.attentions = layer_class, set(attentions)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not isinstance(m, self.layer_class) and (m in self.attentions or not _is_dense(m))


def _is_dense(module: nn.Module) -> bool:
    """Return whether all weights of a module are those of linear layers in it, of which there is more than one."""
    linears = [child for child in module.children() if isinstance(child, nn.Linear)]
    weights = {id(weight) for linear in linears for weight in linear.parameters()}
    return len(linears) > 1 and all(id(weight) in weights for weight in module.parameters())


def trace(model: PreTrainedModel) -> GraphModule:
    """Trace a causal language model of a supported family.

    Args:
        model: A source model or a converted one. The graph shares its modules.

    Returns:
        A module that takes `input_ids` [B, S] and optionally `attention_mask` and `position_ids`, and returns logits
        [B, S, vocabulary]. It has no cache. Its submodules have the model's names, and `meta["config"]` is the model's
        config. Transformations apply to it as to the model.

    Raises:
        UnsupportedModelError: The family is unknown, or the model computes something other than its spec says.
    """
    family = family_of(model.config)
    spec = family.spec
    kept = range(model.config.num_hidden_layers)
    attentions = {layer: model.get_submodule(spec.attention_path(layer)) for layer in kept}
    verify_family(model, spec, [n for n, module in attentions.items() if isinstance(module, family.source_attention)])
    root = _Decoder(model)
    layers = model.get_submodule(f"{spec.base}.{spec.layers}")
    graph = _DecoderTracer(type(layers[0]), attentions.values()).trace(root)  # type: ignore[index]
    graph_module = GraphModule(root, graph, class_name=f"Traced{type(model).__name__}")
    graph_module.meta["config"] = model.config  # A copy of the graph keeps `meta`, but not plain attributes.
    return graph_module.train(model.training)
