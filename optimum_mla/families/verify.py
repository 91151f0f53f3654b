"""Check that an `AttentionSpec` describes a model: the family's own layers compute what the spec says they compute.

A family may share every attribute name with Llama and still compute something else: another score scale, soft-capped
scores, a rotation of some dims only, layers without positions, a multiplier on the residual branch. A conversion that
rests on such a spec would give wrong numbers without a word. So before anything is converted, a few tokens go through
the model, and each layer's real output is compared with the one that is computed from what the spec names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from optimum_mla.core.errors import UnsupportedModelError
from optimum_mla.families.spec import AttentionSpec, SourceAttention, sliding_window, source_attention
from optimum_mla.stack import bare_copy

PROBE_TOKENS = 16
PROBE_SEED = 0
TOLERANCE = 1e-3
"""The largest relative error in float32 between a layer and its description: above all rounding, below any fault."""


@dataclass(frozen=True)
class LayerProbe:
    """The inputs and outputs of one decoder layer, in float32.

    Attributes:
        layer: The layer's index.
        entering: The hidden states before the layer, [1, S, d].
        leaving: The hidden states behind it, [1, S, d].
        normed: The attention's input, [1, S, d].
        attended: The attention's output, [1, S, d].
        middle: The input of the norm before the feed-forward part, [1, S, d].
        fed: The feed-forward part's output, [1, S, d].
        table: cos and sin of the rotary embedding as the attention gets them, or None where it gets none.
    """

    layer: int
    entering: Tensor
    leaving: Tensor
    normed: Tensor
    attended: Tensor
    middle: Tensor
    fed: Tensor
    table: tuple[Tensor, Tensor] | None


@torch.no_grad()
def verify_family(model: nn.Module, spec: AttentionSpec, layers: Iterable[int]) -> None:
    """Refuse a model whose layers compute something else than its spec says.

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
        for layer, (entering, keywords) in inputs.items():
            module = bare_copy(model.get_submodule(spec.layer_path(layer)))
            scaling = getattr(spec.part(model, spec.rotary_path, layer), "attention_scaling", 1.0)
            source = source_attention(spec, module, config, layer, scaling)
            probe = _layer_probe(module.float(), spec, layer, entering, keywords)
            if differences := list(_differences(spec, config, source, probe)):
                raise UnsupportedModelError(
                    f"model: layer {layer} of this {spec.model_type} model is not what its AttentionSpec says: "
                    f"{'; '.join(differences)}. Such a family needs more than a spec (docs/add_a_family.md)."
                )
        expected = model.get_submodule(spec.head)(last)
        if _error(logits.float(), expected.float()) > TOLERANCE:
            raise UnsupportedModelError(
                f"model: the logits of this {spec.model_type} model are not what its head makes of the normed states "
                "(they are scaled or capped). Such a family needs more than a spec (docs/add_a_family.md)."
            )
    finally:
        for module, training in modes.items():
            module.training = training


def _first_pass(
    model: nn.Module, spec: AttentionSpec, config: Any, layers: Iterable[int]
) -> tuple[dict[int, tuple[Tensor, dict[str, Any]]], Tensor, Tensor]:
    """Run a few tokens through the model, and check what enters the first layer.

    Returns:
        The input and the keywords of each layer, the states behind the last norm, and the logits.
    """
    embedding = model.get_submodule(f"{spec.base}.{spec.embedding}")
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
        handle = model.get_submodule(f"{spec.base}.{spec.norm}").register_forward_hook(
            lambda module, args, output: last.append(output)
        )
        stack.callback(handle.remove)
        logits = model(ids, use_cache=False).logits
    first, expected = seen[0][0].float(), embedding(ids).float()
    if _error(first, expected) > TOLERANCE:
        factor = float((first * expected).sum() / expected.square().sum())
        raise UnsupportedModelError(
            f"model: the embeddings of this {spec.model_type} model are not what enters its first layer "
            f"(they are multiplied by about {factor:.4g}). Such a family needs more than a spec (docs/add_a_family.md)."
        )
    return {layer: seen[layer] for layer in layers}, last[0], logits


def _layer_probe(
    module: nn.Module, spec: AttentionSpec, layer: int, entering: Tensor, keywords: dict[str, Any]
) -> LayerProbe:
    """Run a copy of one layer in float32, and note what its parts were given and gave."""
    wide = {name: _to_float32(value) for name, value in keywords.items()}
    noted: dict[str, Any] = {}

    def part(name: str) -> nn.Module:
        return spec.part(module, name, layer)

    def given(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            noted[name] = args[0] if args else kwargs["hidden_states"]
            if "position_embeddings" in kwargs:
                noted["table"] = kwargs["position_embeddings"]

        return hook

    def gave(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            noted[name] = output[0] if isinstance(output, tuple) else output

        return hook

    part(spec.attention).register_forward_pre_hook(given("normed"), with_kwargs=True)
    part(spec.attention).register_forward_hook(gave("attended"))
    part(spec.mlp_norm).register_forward_pre_hook(given("middle"), with_kwargs=True)
    part(spec.mlp).register_forward_hook(gave("fed"))
    leaving = module(entering.float(), **wide)
    return LayerProbe(
        layer=layer,
        entering=entering.float(),
        leaving=leaving[0] if isinstance(leaving, tuple) else leaving,
        normed=noted["normed"],
        attended=noted["attended"],
        middle=noted["middle"],
        fed=noted["fed"],
        table=noted.get("table"),
    )


def _to_float32(value: Any) -> Any:
    """Return tensors, and those in tuples, in float32; everything else as it is."""
    if isinstance(value, Tensor) and value.is_floating_point():
        # An additive mask of 16 bits holds the lowest number of its dtype, which hides a token in float32 as well.
        return value.float()
    if isinstance(value, tuple):
        return tuple(_to_float32(item) for item in value)
    return value


def norm_eps(config: Any) -> float:
    """Return what the model's RMSNorms add to the mean square."""
    return float(getattr(config, "rms_norm_eps", 1e-6))


def _error(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference, relative to the norm of what was expected."""
    size = expected.double().norm()
    return float((found.double() - expected.double()).norm() / (size if size > 0 else 1.0))


def _differences(spec: AttentionSpec, config: Any, source: SourceAttention, probe: LayerProbe) -> Iterable[str]:
    """Yield, in words, what the layer does that its spec does not say."""
    g = source.geometry
    for name, declared in ((spec.query, g.query_bias), (spec.key, g.key_value_bias), (spec.value, g.key_value_bias)):
        if (source.module.get_submodule(name).bias is not None) != declared:
            yield f"{name} has {'no' if declared else 'a'} bias, and the spec says otherwise"
    if (source.module.get_submodule(spec.output).bias is not None) != g.output_bias:
        yield f"{spec.output} has {'no' if g.output_bias else 'a'} bias, and the spec says otherwise"
    if probe.table is None:
        yield "its attention gets no rotary table (position_embeddings)"
        return
    if probe.table[0].shape[-1] != g.head_dim:
        yield f"it rotates {probe.table[0].shape[-1]} of {g.head_dim} dims of a head (partial rotation)"
    expected = _reference(spec, config, source, probe, Reading(g.head_dim**-0.5))
    error = _error(probe.attended, expected)
    # A soft-cap acts on large scores only, which the probe may not have.
    if error > TOLERANCE or getattr(config, "attn_logit_softcapping", None) is not None:
        yield f"{_explained(spec, config, source, probe)} (relative error of the attention's output: {error:.2g})"
    gain = source.input_gain.double()
    rms = probe.entering.double().square().mean(-1, keepdim=True).add(norm_eps(config)).rsqrt()
    if _error(probe.normed, probe.entering.double() * rms * gain) > TOLERANCE:
        shifted = _error(probe.normed, probe.entering.double() * rms * (1 + gain)) <= TOLERANCE
        what = "multiplies by one plus its weight" if shifted else "is no RMSNorm of the layer's input"
        yield f"{spec.input_norm} {what}"
    branch = (probe.middle - probe.entering).double()
    if _error(branch, probe.attended) > TOLERANCE:
        factor = float((branch * probe.attended).sum() / probe.attended.double().square().sum())
        scaled = _error(branch, factor * probe.attended.double()) <= TOLERANCE
        how = f"multiplied by {factor:.4g} (a residual multiplier)" if scaled else "normed or combined in another way"
        yield f"the attention's output is {how} before it is added to the hidden state"
    if _error(probe.leaving, probe.middle.double() + probe.fed) > TOLERANCE:
        yield "the feed-forward part's output is scaled, normed or combined in another way"


@dataclass(frozen=True)
class Reading:
    """A way to compute attention from a spec's tensors.

    Attributes:
        scale: The factor on products of queries and keys.
        cap: The soft-cap on the scaled scores, or None.
        rotation: `half` (two halves of a head turn together), `interleaved` (neighbours do), or `none`.
    """

    scale: float
    cap: float | None = None
    rotation: str = "half"


def _reference(
    spec: AttentionSpec, config: Any, source: SourceAttention, probe: LayerProbe, reading: Reading
) -> Tensor:
    """Compute the attention's output [1, S, d] in float64 from the tensors that the spec names."""
    g, x = source.geometry, probe.normed.double()
    biases = (
        source.query_bias if g.query_bias else 0.0,
        source.key_bias if g.key_value_bias else 0.0,
        source.value_bias if g.key_value_bias else 0.0,
    )
    query, key, value = (
        torch.einsum("hed,bsd->bshe", weight, x) + bias
        for weight, bias in zip((source.query, source.key, source.value), biases, strict=True)
    )
    query, key = _normed(query, source, spec.query_norm, config), _normed(key, source, spec.key_norm, config)
    query, key, value = (heads.transpose(1, 2) for heads in (query, key, value))
    if probe.table is not None and reading.rotation != "none":
        query, key = (_turned(heads, probe.table, reading.rotation) for heads in (query, key))
    share = g.num_attention_heads // g.num_key_value_heads
    scores = query @ key.repeat_interleave(share, dim=1).mT * reading.scale
    if reading.cap is not None:
        scores = reading.cap * torch.tanh(scores / reading.cap)
    tokens = torch.arange(x.shape[1], device=x.device)
    distance, window = tokens[:, None] - tokens, sliding_window(config, probe.layer)
    seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    context = (weights @ value.repeat_interleave(share, dim=1)).transpose(1, 2).flatten(2)
    output = source.output()
    attended = context @ output["o_proj.weight"].double().T
    return attended + output["o_proj.bias"].double() if g.output_bias else attended


def _normed(heads: Tensor, source: SourceAttention, name: str | None, config: Any) -> Tensor:
    """Return heads [1, S, X, D] behind the query or key norm that the spec names, if any."""
    if name is None:
        return heads
    rms = heads.square().mean(-1, keepdim=True).add(norm_eps(config)).rsqrt()
    return heads * rms * source.norm_gain(name)


def _turned(heads: Tensor, table: tuple[Tensor, Tensor], rotation: str) -> Tensor:
    """Rotate heads [1, X, S, D] by cos and sin [1, S, W]; dims behind the first W stay as they are."""
    cos, sin = (part.double().unsqueeze(1) for part in table)
    width = cos.shape[-1]
    turning, still = heads.split([width, heads.shape[-1] - width], dim=-1)
    if rotation == "interleaved":
        cos, sin = (part[..., : width // 2].repeat_interleave(2, dim=-1) for part in (cos, sin))
        even, odd = turning[..., 0::2], turning[..., 1::2]
        quarter = torch.stack([-odd, even], dim=-1).flatten(-2)
    else:
        first, second = turning.chunk(2, dim=-1)
        quarter = torch.cat([-second, first], dim=-1)
    return torch.cat([turning * cos + quarter * sin, still], dim=-1)


def _explained(spec: AttentionSpec, config: Any, source: SourceAttention, probe: LayerProbe) -> str:
    """Say in which other way the attention computes, if a known one gives its real output."""
    usual, module = source.geometry.head_dim**-0.5, source.module
    scales = dict.fromkeys([usual, float(getattr(module, "scaling", None) or usual)])
    cap = getattr(config, "attn_logit_softcapping", None)
    for scale, rotation in product(scales, ("half", "interleaved", "none")):
        reading = Reading(scale, cap, rotation)
        if _error(probe.attended, _reference(spec, config, source, probe, reading)) > TOLERANCE:
            continue
        words = []
        if scale != usual:
            words.append(f"scores are multiplied by {scale:.4g} instead of head_dim ** -0.5 = {usual:.4g}")
        if cap is not None:
            words.append(f"scores are soft-capped at {cap:g}")
        if rotation == "interleaved":
            words.append("it rotates neighbouring dims instead of two halves of a head")
        if rotation == "none":
            words.append("it does not rotate queries and keys (a layer without positions)")
        return "; ".join(words)
    return "its attention gives another output than the projections and norms that the spec names"
