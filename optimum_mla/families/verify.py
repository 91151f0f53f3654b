"""Check that an `AttentionSpec` describes a model: the family's own layers compute what the spec says they compute.

A family may share every attribute name with Llama and still compute something else: soft-capped scores, a rotation of
neighbouring dims, layers without positions, queries that grow with the position. A conversion that rests on such a spec
would give wrong numbers without a word. So before anything is converted, a few tokens go through the model, and the
real output of each attention is compared with the one that is computed from what the spec names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain, combinations
from typing import Any

import torch
from torch import Tensor, nn

from optimum_mla.core.errors import UnsupportedModelError
from optimum_mla.families.project import SourceAttention, source_attention
from optimum_mla.families.spec import AttentionSpec, layer_type, sliding_window
from optimum_mla.ops.blockwise import capped
from optimum_mla.ops.rotary import Rotation, rotate
from optimum_mla.stack import bare_copy, by_layer_type, rotary_dims, rotary_table

PROBE_TOKENS = 16
PROBE_SEED = 0
FAR = 100_003
"""A position at which an attention must still compute what it computes at the start."""
NORM_EPS_FIELDS = ("rms_norm_eps", "layer_norm_eps", "norm_epsilon")
"""Names of the config field with the epsilon of the norms before the attention."""
TOLERANCE = 1e-3
"""The largest relative error in float32 between a layer and its description: above all rounding, below any fault."""


@dataclass(frozen=True)
class AttentionProbe:
    """The input and the outputs of one attention, in float32.

    Attributes:
        entering: The hidden states before the layer, [1, S, d].
        normed: The attention's input, [1, S, d].
        attended: The attention's output at the positions from 0 on, [1, S, d].
        far: Its output at positions from `FAR` on, [1, S, d].
        table: cos and sin of the rotary embedding as the attention gets them, or None where it gets none.
        far_table: The same from `FAR` on, or None.
    """

    entering: Tensor
    normed: Tensor
    attended: Tensor
    far: Tensor
    table: tuple[Tensor, Tensor] | None
    far_table: tuple[Tensor, Tensor] | None


@torch.no_grad()
def verify_family(model: nn.Module, spec: AttentionSpec, layers: Iterable[int]) -> None:
    """Refuse a model whose attention computes something else than its spec says.

    Args:
        model: A source model, or one that was converted in other layers.
        spec: The family of the model.
        layers: The indices of the layers to check; they must still have the source's attention.

    Raises:
        UnsupportedModelError: With what differs, where that can be told.
    """
    config: Any = model.config
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        inputs, last, logits = _first_pass(model, spec, config, sorted(layers))
        rotary = spec.part(model, spec.rotary_path, 0)
        for layer, (entering, keywords) in inputs.items():
            module = bare_copy(model.get_submodule(spec.layer_path(layer)))
            probe = _probe(module.float(), spec, config, layer, rotary, entering, keywords)
            if differences := list(_differences(spec, config, layer, module, rotary, probe)):
                raise UnsupportedModelError(
                    f"model: layer {layer} of this {spec.model_type} model is not what its AttentionSpec says: "
                    f"{'; '.join(differences)}. See docs/add_a_family.md."
                )
        headed = model.get_submodule(spec.head)(last)
        if error_of(logits.float(), spec.logits(config, headed.float())) > TOLERANCE:
            raise UnsupportedModelError(
                f"model: the logits of this {spec.model_type} model are not what its AttentionSpec says: its head and "
                "the factors and the cap on its logits give others. See docs/add_a_family.md."
            )
    finally:
        for module, training in modes.items():
            module.training = training


def _first_pass(
    model: nn.Module, spec: AttentionSpec, config: Any, layers: list[int]
) -> tuple[dict[int, tuple[Tensor, dict[str, Any]]], Tensor, Tensor]:
    """Run a few tokens through the model, and check what enters the first layer.

    Returns:
        The input and the keywords of each layer, the states after the last norm, and the logits.
    """
    embedding = spec.part(model, f"{spec.base}.{spec.embedding}", 0)
    weight = next(embedding.parameters())
    generator = torch.Generator().manual_seed(PROBE_SEED)
    ids = torch.randint(config.vocab_size, (1, PROBE_TOKENS), generator=generator)
    if not weight.is_meta:  # Otherwise the hooks of accelerate move what is given.
        ids = ids.to(weight.device)
    seen: dict[int, tuple[Tensor, dict[str, Any]]] = {}

    def note(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states = args[0] if args else kwargs["hidden_states"]
            rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            seen[layer] = states, rest

        return hook

    with ExitStack() as stack:
        for layer in {0, *layers}:
            module = model.get_submodule(spec.layer_path(layer))
            handle = module.register_forward_pre_hook(note(layer), with_kwargs=True)
            stack.callback(handle.remove)
        last: list[Tensor] = []
        handle = spec.part(model, f"{spec.base}.{spec.norm}", 0).register_forward_hook(
            lambda module, args, output: last.append(output)
        )
        stack.callback(handle.remove)
        logits = model(ids, use_cache=False).logits
    first, embedded = seen[0][0].float(), spec.embedded(config, embedding(ids)).float()
    if error_of(first, embedded) > TOLERANCE:
        factor = float((first * embedded).sum() / embedded.square().sum())
        raise UnsupportedModelError(
            f"model: the embeddings of this {spec.model_type} model are not what enters its first layer (they are "
            f"multiplied by about {factor:.4g}, which its AttentionSpec must say). See docs/add_a_family.md."
        )
    return {layer: seen[layer] for layer in layers}, last[0], logits


def _probe(
    module: nn.Module,
    spec: AttentionSpec,
    config: Any,
    layer: int,
    rotary: Any,
    entering: Tensor,
    keywords: dict[str, Any],
) -> AttentionProbe:
    """Run a copy of one layer in float32, and its attention once more at far positions; note inputs and outputs."""
    wide = {name: _to_float32(value) for name, value in keywords.items()}
    noted: dict[str, Any] = {}
    attention = spec.part(module, spec.attention, layer)

    def given(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        noted["normed"] = args[0] if args else kwargs["hidden_states"]
        noted["rest"] = args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"}

    def gave(module: nn.Module, args: Any, output: Any) -> None:
        noted["attended"] = output[0] if isinstance(output, tuple) else output

    hooks = (attention.register_forward_pre_hook(given, with_kwargs=True), attention.register_forward_hook(gave))
    module(entering.float(), **wide)
    for hook in hooks:
        hook.remove()
    args, rest = noted["rest"]
    table, far_table, normed = rest.get("position_embeddings"), None, noted["normed"]
    if table is not None:
        positions = torch.arange(FAR, FAR + normed.shape[1], device=normed.device)[None]
        far_table = rotary_table(rotary, normed, positions, by_layer_type(rotary, layer_type(config, layer)))
        rest = {**rest, "position_embeddings": far_table}
        rest |= {"position_ids": positions} if "position_ids" in rest else {}
    far = attention(normed, *args, **rest)
    return AttentionProbe(entering.float(), normed, noted["attended"], far[0], table, far_table)


def _to_float32(value: Any) -> Any:
    """Return tensors, and those in tuples, in float32; everything else as it is."""
    if isinstance(value, Tensor) and value.is_floating_point():
        # An additive mask of 16 bits holds the lowest number of its dtype, which hides a token in float32 as well.
        return value.float()
    if isinstance(value, tuple):
        return tuple(_to_float32(item) for item in value)
    return value


def error_of(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference, relative to the norm of what was expected."""
    size = expected.double().norm()
    return float((found.double() - expected.double()).norm() / (size if size > 0 else 1.0))


def _differences(
    spec: AttentionSpec, config: Any, layer: int, module: nn.Module, rotary: Any, probe: AttentionProbe
) -> Iterator[str]:
    """Yield, in words, what the layer does that its spec does not say."""
    source = source_attention(spec, module, config, layer, rotary)
    g = source.geometry
    declared = {"query": g.query_bias, "key": g.key_value_bias, "value": g.key_value_bias, "output": g.output_bias}
    for part, said in declared.items():
        if source.biased(part) != said:
            yield f"the {part} projection has {'no' if said else 'a'} bias, and the spec says otherwise"
    if getattr(source.module, "sinks", None) is not None:
        yield "it has attention sinks, a learned logit for each head that no token has, which latent attention lacks"
        return
    if probe.table is None or probe.far_table is None:
        yield "its attention gets no rotary table (position_embeddings)"
        return
    turned = rotary_dims(rotary, layer_type(config, layer), g.head_dim)
    if probe.table[0].shape[-1] != turned:
        yield f"its rotary tables are for {probe.table[0].shape[-1]} dims, and its frequencies for {turned}"
        return
    error = error_of(probe.attended, expected_output(source, config, layer, probe.normed, probe.table))
    if error > TOLERANCE:
        yield f"{explained(spec, config, layer, module, rotary, probe)} (relative error of its output: {error:.2g})"
    elif error_of(probe.far, expected_output(source, config, layer, probe.normed, probe.far_table)) > TOLERANCE:
        yield f"from position {FAR} on its attention computes something else than at the start of a text"
    if spec.input_norm is not None and not _is_norm(spec, config, source, probe):
        yield f"{spec.input_norm} is neither an RMSNorm nor a LayerNorm with the gain that the spec says"
    cap = next((value for name, value in vars(config).items() if "attn_logit_softcap" in name and value), None)
    if g.logit_cap is None and cap is not None:  # It acts on large scores only, which the probe may not have.
        yield f"its scores are soft-capped at {cap:g}, and the spec names no logit_cap"


def _is_norm(spec: AttentionSpec, config: Any, source: SourceAttention, probe: AttentionProbe) -> bool:
    """Return whether the attention's input is the layer's input after a norm with the gain of the spec, and a bias."""
    x = probe.entering.double()
    eps = next((value for name in NORM_EPS_FIELDS if (value := getattr(config, name, None)) is not None), 1e-6)
    for centered in (x, x - x.mean(-1, keepdim=True)):
        plain = centered * centered.square().mean(-1, keepdim=True).add(float(eps)).rsqrt() * source.input_gain.double()
        rest = probe.normed.double() - plain  # A bias is the same for all tokens.
        # States that are not finite are told elsewhere, with a better word for it.
        if not error_of(plain + rest.mean(1, keepdim=True), probe.normed) > TOLERANCE:
            return True
    return False


def expected_output(
    source: SourceAttention, config: Any, layer: int, normed: Tensor, table: tuple[Tensor, Tensor]
) -> Tensor:
    """Return the attention's output [1, S, d] in float64, computed from the tensors that the spec names.

    It is that for the input `normed`, [1, S, d], and the `table` of cos and sin as the attention gets it.
    """
    g, x = source.geometry, normed.double()
    heads = source.project(x)
    rotation = Rotation(*(part.double().unsqueeze(1) for part in source.pairs.cos_sin(table)))
    query, key = rotate(heads.query, rotation), rotate(heads.key, rotation)
    share = g.num_attention_heads // g.num_key_value_heads
    scores = capped(query @ key.repeat_interleave(share, dim=1).mT * g.head_dim**-0.5, g.logit_cap)
    tokens = torch.arange(x.shape[1], device=x.device)
    distance, window = tokens[:, None] - tokens, sliding_window(config, layer)
    seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    context = (weights @ heads.value.repeat_interleave(share, dim=1)).transpose(1, 2).flatten(2)
    output = source.output()
    attended = context @ output["o_proj.weight"].double().T
    return attended + output["o_proj.bias"].double() if "o_proj.bias" in output else attended


VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    "interleaved": ({"interleaved": True}, "it rotates neighbouring dims instead of two halves of a head"),
    "table": ({"interleaved_table": True}, "its rotary tables repeat each angle for neighbouring dims"),
    "norms": ({"norm_offset": 1.0}, "its norms multiply by one plus their weight"),
    "joint": ({"joint_norms": True}, "its query and key norms are over all heads together"),
    "no positions": ({}, "it does not rotate queries and keys (a layer without positions)"),
}
"""Each variant names the fields of a spec that say what a family does otherwise than Llama, and has words for it."""


def explained(
    spec: AttentionSpec, config: Any, layer: int, module: nn.Module, rotary: Any, probe: AttentionProbe
) -> str:
    """Say in which other way the attention computes, if a known one gives its real output."""
    for names in chain.from_iterable(combinations(VARIANTS, count) for count in (1, 2)):
        fields = {name: value for chosen in names for name, value in VARIANTS[chosen][0].items()}
        try:
            source = source_attention(replace(spec, **fields), module, config, layer, rotary)
            if "no positions" in names:
                source.pairs = replace(source.pairs, rotates=False)
            output = expected_output(source, config, layer, probe.normed, probe.table)  # type: ignore[arg-type]
        except (RuntimeError, UnsupportedModelError):  # Shapes do not fit.
            continue
        if error_of(probe.attended, output) <= TOLERANCE:
            said = ", ".join(f"{name}={value}" for name, value in fields.items())
            words = "; ".join(VARIANTS[name][1] for name in names)
            return f"{words} (an AttentionSpec with {said} says so)" if said else words
    return "its attention gives another output than the projections and norms that the spec names"
