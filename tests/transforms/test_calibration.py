"""The calibration walk and its measurements against the source model itself and against slow explicit loops."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_mla import MHA2MLA
from optimum_mla.models import SourceAttention, family_of
from optimum_mla.ops.rope_mix import RopeMix, identity_mix, query_aware_mix
from optimum_mla.transforms.calibration import (
    DAMAGE_ROWS,
    DAMAGE_WINDOWS,
    DECIDING_WINDOWS,
    HELD_BACK,
    CalibrationWalk,
    LayerCalibration,
)
from tests.cases import source_model, token_ids

FAMILIES = ["llama", "qwen3", "llama with yarn", "mistral with a window"]
HEADS, GROUPS, HEAD_DIM, PAIRS, LAYERS = 4, 2, 16, 8, 3
"""Of every model in `tests.cases.SIZES`."""
IDS = token_ids(batch=6, length=24)
HELD = [3]
"""The one window of six that is held back."""


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def walk_through(model: PreTrainedModel, ids: Tensor = IDS) -> CalibrationWalk:
    return CalibrationWalk(model, family_of(model.config).spec, model.config, ids)


def sources_of(model: PreTrainedModel) -> dict[int, SourceAttention]:
    return MHA2MLA()._sources(family_of(model.config), model)


def layer_inputs(model: PreTrainedModel, ids: Tensor = IDS) -> list[Tensor]:
    """The states before each layer and before the final norm, as the model itself has them."""
    found: list[Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, args: found.append(args[0]))
        for module in [*model.model.layers, model.model.norm]
    ]
    outputs = model(ids, output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    assert all(torch.equal(one, other) for one, other in zip(outputs[:-1], found, strict=False))
    return found


def middle_states(model: PreTrainedModel, layer: int, ids: Tensor = IDS) -> Tensor:
    """The states behind a layer's attention, as the model itself has them."""
    found: list[Tensor] = []
    norm = model.model.layers[layer].post_attention_layernorm
    hook = norm.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    model(ids)
    hook.remove()
    return found[0]


def disturbed(model: PreTrainedModel, layer: int, noise: float = 0.3) -> PreTrainedModel:
    """A copy in which one layer's attention has other weights."""
    clone = copy.deepcopy(model)
    for parameter in clone.model.layers[layer].self_attn.parameters():
        parameter.add_(noise * parameter.std() * torch.randn_like(parameter))
    return clone


class Walked:
    """A model whose layer 0 was replaced by another attention, the walk before layer 1, and what each sees there."""

    def __init__(self, family: str, ids: Tensor = IDS) -> None:
        self.ids = ids
        self.model = source_model(family, torch.float64)
        self.changed = disturbed(self.model, 0)
        self.walk = walk_through(self.model, ids)
        self.walk.advance(self.changed.model.layers[0].self_attn)
        self.calibration = self.walk.calibrate(sources_of(self.model)[1])
        self.layer: Any = self.model.model.layers[1]
        self.converted = layer_inputs(self.changed, ids)[1]
        sizes = middle_states(self.model, 1, ids).square().mean(-1)
        self.row_weights = 1 / sizes / (1 / sizes).mean()  # [N, L]


class Heads:
    """One window at one layer, head by head: queries, keys and values, and what the attention does with them."""

    def __init__(self, walked: Walked, window: int) -> None:
        model, attention = walked.model, walked.layer.self_attn
        self.x = walked.layer.input_layernorm(walked.converted[window])
        length = len(self.x)
        query, key, value = (
            getattr(attention, f"{name}_proj")(self.x).view(length, -1, HEAD_DIM).transpose(0, 1) for name in "qkv"
        )
        self.raw_key, self.key_factor = key, torch.ones(GROUPS, length, dtype=torch.float64)
        if hasattr(attention, "q_norm"):
            query = attention.q_norm(query)
            self.key_factor = (key.square().mean(-1) + attention.k_norm.variance_epsilon).rsqrt()
            self.raw_key = key * attention.k_norm.weight
            key = attention.k_norm(key)
        self.query, self.key, self.value = query, key, value
        cos, sin = model.model.rotary_emb(self.x[None], torch.arange(length)[None])
        self.turn = torch.complex(cos, sin)[0, :, :PAIRS].to(torch.complex128)  # [L, D/2]
        self.factor = float(self.turn[0, 0].abs())
        window_size = getattr(model.config, "sliding_window", None)
        self.weights = torch.zeros(HEADS, length, length, dtype=torch.float64)
        for head in range(HEADS):
            turned_query, turned_key = pairs(query[head]) * self.turn, pairs(key[head // 2]) * self.turn
            for t in range(length):
                first = 0 if window_size is None else max(0, t - window_size + 1)
                logits = (turned_query[t].conj() * turned_key[first : t + 1]).real.sum(-1) / HEAD_DIM**0.5
                self.weights[head, t, first : t + 1] = logits.softmax(-1)

    def spread(self, output: Tensor, head: int, t: int) -> float:
        """Variance of what the values add to the state."""
        added = self.value[head // 2] @ output[:, head * HEAD_DIM : (head + 1) * HEAD_DIM].T  # [L, d]
        weights = self.weights[head, t]
        mean = weights @ added
        return float(weights @ (added - mean).square().sum(-1))


def pairs(heads: Tensor) -> Tensor:
    """Half-split dims [..., D] as complex pairs."""
    return torch.complex(heads[..., :PAIRS], heads[..., PAIRS:])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_walk_passes_through_the_models_own_states(family: str) -> None:
    model = source_model(family)
    walk = walk_through(model)
    for layer, states in enumerate(layer_inputs(model)):
        assert walk.layer == layer
        assert walk.converted is walk.source
        assert torch.allclose(walk.source, states, rtol=1e-5, atol=1e-5)
        if layer < LAYERS:
            assert torch.allclose(walk.middle, middle_states(model, layer), rtol=1e-5, atol=1e-5)
            walk.advance()
    final = model(IDS, output_hidden_states=True).hidden_states[-1]
    assert torch.allclose(model.model.norm(walk.source), final, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("replaced", [0, 1, 2])
def test_the_converted_stream_is_that_of_the_changed_model(family: str, replaced: int) -> None:
    model = source_model(family, torch.float64)
    changed = disturbed(model, replaced)
    walk = walk_through(model)
    own, other = layer_inputs(model), layer_inputs(changed)
    for layer in range(LAYERS):
        walk.advance(changed.model.layers[layer].self_attn if layer == replaced else None)
        assert torch.allclose(walk.source, own[layer + 1], rtol=1e-10, atol=1e-10)
        assert torch.allclose(walk.converted, other[layer + 1], rtol=1e-10, atol=1e-10)
        assert (walk.converted is walk.source) == (layer < replaced)
    assert (own[-1] - other[-1]).norm() > 1e-2 * own[-1].norm()


def test_many_tokens_go_through_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = source_model("qwen3", torch.float64)
    changed, sources = disturbed(model, 0), sources_of(model)

    def measured() -> list[Tensor]:
        walk = walk_through(model)
        walk.advance(changed.model.layers[0].self_attn)
        calibration = walk.calibrate(sources[1])
        healing = calibration.heal(model.model.layers[1].self_attn)
        assert healing.weight is not None
        errors = [healing.error_before, healing.error_after, calibration.error(changed.model.layers[1].self_attn)]
        moments = calibration.moments
        return [
            walk.source,
            walk.converted,
            moments.inputs,
            moments.input_mean,
            moments.queries,
            moments.key_scale,
            calibration.contribution(),
            healing.weight,
            torch.tensor(errors, dtype=torch.float64),
        ]

    whole = measured()
    for tokens in (1, 4 * 24):  # one window at a time; four, then the other two
        monkeypatch.setattr("optimum_mla.transforms.calibration.TOKENS_PER_BATCH", tokens)
        assert all(
            torch.allclose(part, all_at_once, rtol=1e-9, atol=1e-11)
            for part, all_at_once in zip(measured(), whole, strict=True)
        )


def test_a_half_precision_model_walks_in_float32_and_stays_as_it_is() -> None:
    model = source_model("llama", torch.bfloat16).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    walk = walk_through(model)
    calibration = walk.calibrate(sources_of(model)[0])
    assert {walk.source.dtype, calibration.dtype, next(walk.block.attention.parameters()).dtype} == {torch.float32}
    assert calibration.moments.inputs.dtype == torch.float64
    walk.advance()
    assert model.training
    assert model.config._attn_implementation == model.model.layers[0].self_attn.config._attn_implementation
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])
    expected = layer_inputs(model.to(torch.float32))[1]
    assert torch.allclose(walk.source, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_are_those_of_a_slow_loop(family: str) -> None:
    walked = Walked(family, IDS[:3, :14])
    count, length = walked.ids.shape
    output = walked.layer.self_attn.o_proj.weight
    hidden_size = output.shape[0]
    second, mean, total = torch.zeros(hidden_size, hidden_size).double(), torch.zeros(hidden_size).double(), 0.0
    queries = torch.zeros(HEADS, HEAD_DIM, HEAD_DIM, dtype=torch.float64)
    key_scale = torch.zeros(GROUPS, dtype=torch.float64)
    for window in range(count):
        heads, rows = Heads(walked, window), walked.row_weights[window]
        for s in range(length):
            received = sum(float(heads.weights[h, t, s] * rows[t]) for h in range(HEADS) for t in range(length)) / HEADS
            share = 0.5 + 0.5 * received
            second += share * torch.outer(heads.x[s], heads.x[s])
            mean += share * heads.x[s]
            total += share
        for t in range(length):
            for h in range(HEADS):
                effect = float(rows[t]) * heads.spread(output, h, t)
                queries[h] += effect * torch.outer(heads.query[h, t], heads.query[h, t]) / (count * length)
        key_scale += heads.key_factor.square().sum(1) / (count * length)
    assert total == pytest.approx(count * length)
    mean = mean / total
    moments = walked.calibration.moments
    assert torch.allclose(moments.inputs, second / total - torch.outer(mean, mean), rtol=1e-8, atol=1e-10)
    assert torch.allclose(moments.input_mean, mean, rtol=1e-8, atol=1e-10)
    assert torch.allclose(moments.queries, queries, rtol=1e-8, atol=1e-8 * float(queries.abs().max()))
    assert torch.allclose(moments.key_scale, key_scale, rtol=1e-8)
    assert torch.equal(moments.key_scale, torch.ones(GROUPS).double()) == (family != "qwen3")


def slow_damage(walked: Walked, mix: RopeMix, windows: list[int], rows: list[int]) -> Tensor:
    """Variance, under each row's attention, of the logits' change when one component stops rotating; weighted."""
    output = walked.layer.self_attn.o_proj.weight
    total = torch.zeros(GROUPS * PAIRS, dtype=torch.float64)
    for window in windows:
        heads = Heads(walked, window)
        spread = [[heads.spread(output, head, t) for t in rows] for head in range(HEADS)]
        raw = pairs(heads.raw_key)  # [G, L, D/2]
        for component in range(GROUPS * PAIRS):
            j, p = divmod(component, PAIRS)
            mixed = sum(mix.keys[p, j, g] * raw[g, :, p] for g in range(GROUPS))
            for head in range(HEADS):
                key = mixed * heads.key_factor[head // 2]
                query = mix.queries[p, j, head // 2] * pairs(heads.query[head])[:, p]
                for row, t in enumerate(rows):
                    turned = ((query[t] * heads.turn[t, p]).conj() * key * heads.turn[:, p]).real
                    still = (query[t].conj() * key).real * heads.factor**2
                    change = (turned - still) / HEAD_DIM**0.5
                    weights = heads.weights[head, t]
                    variance = weights @ (change - weights @ change).square()
                    total[component] += variance * spread[head][row] * walked.row_weights[window, t]
    return total / (len(windows) * len(rows))


def random_mix() -> RopeMix:
    root = torch.randn(PAIRS, GROUPS, GROUPS, dtype=torch.complex128)
    return query_aware_mix(root @ root.mH, torch.rand(GROUPS, PAIRS, dtype=torch.float64) + 0.1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mixed", [False, True])
def test_damage_is_that_of_a_slow_loop(family: str, mixed: bool) -> None:
    walked = Walked(family, IDS[:2, :12])
    mix = random_mix() if mixed else identity_mix(GROUPS, PAIRS)
    expected = slow_damage(walked, mix, windows=[0, 1], rows=list(range(12)))
    damage = walked.calibration.damage(mix)
    assert expected.min() > 0
    assert torch.allclose(damage, expected, rtol=1e-6, atol=1e-9 * float(expected.max()))


def test_damage_of_many_tokens_is_measured_on_a_part_of_them() -> None:
    count, length = 2 * DAMAGE_WINDOWS, DAMAGE_ROWS + 8
    walked = Walked("llama", token_ids(count, length))
    rows = torch.linspace(length / DAMAGE_ROWS, length - 1, DAMAGE_ROWS).long().tolist()
    assert len(set(rows)) == DAMAGE_ROWS
    mix = random_mix()
    expected = slow_damage(walked, mix, windows=list(range(0, count, 2)), rows=rows)
    assert torch.allclose(walked.calibration.damage(mix), expected, rtol=1e-6, atol=1e-9 * float(expected.max()))


@pytest.mark.parametrize("count", [1, 15, 17, 31, 33, 100])
def test_no_more_windows_are_measured_than_said(count: int) -> None:
    model = source_model("llama")
    walk = walk_through(model, token_ids(HELD_BACK * count, 3))
    calibration = walk.calibrate(sources_of(model)[0])
    seen: list[Tensor] = []
    hook = walk.block.attention.get_submodule("q_proj").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    calibration.error(walk.block.attention)
    deciding = torch.cat(seen)
    seen.clear()
    calibration.damage(identity_mix(GROUPS, PAIRS))
    damaged = len(torch.cat(seen))
    hook.remove()
    normed = walk.block.input_norm(walk.source)[HELD_BACK - 1 :: HELD_BACK]
    assert all(any(torch.allclose(window, held) for held in normed) for window in deciding)
    assert min(count, DECIDING_WINDOWS // 2) <= len(deciding) <= DECIDING_WINDOWS
    assert min(HELD_BACK * count, DAMAGE_WINDOWS // 2) <= damaged <= DAMAGE_WINDOWS


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sources_own_attention_leaves_no_error(family: str) -> None:
    model = source_model(family)
    sources, walk = sources_of(model), walk_through(model)
    for layer in range(LAYERS):
        calibration = walk.calibrate(sources[layer])
        assert calibration.error(model.model.layers[layer].self_attn) < 1e-5
        assert calibration.error(walk.block.attention) < 1e-5
        walk.advance()


@pytest.mark.parametrize("family", FAMILIES)
def test_error_is_relative_to_the_states_of_the_held_back_windows(family: str) -> None:
    walked = Walked(family)
    candidate = disturbed(walked.model, 1)
    candidate.model.layers[0] = walked.changed.model.layers[0]
    target, actual = middle_states(walked.model, 1)[HELD], middle_states(candidate, 1)[HELD]
    relative = (actual - target).square().sum(-1) / target.square().sum(-1)
    error = walked.calibration.error(candidate.model.layers[1].self_attn)
    assert error == pytest.approx(float(relative.mean().sqrt()), rel=1e-8)
    assert error > 1e-3


def with_output(attention: nn.Module, weight: Tensor | None) -> nn.Module:
    """A copy of the attention with another output projection, where one is given."""
    clone: Any = copy.deepcopy(attention)
    if weight is not None:
        clone.o_proj.weight.copy_(weight)
    return clone


HEALED = [*FAMILIES, "llama with biases"]


@pytest.mark.parametrize("family", HEALED)
@pytest.mark.parametrize("noise", [0.0, 0.01, 0.3, 3.0])
def test_healing_never_raises_the_held_back_error(family: str, noise: float) -> None:
    walked = Walked(family)
    attention = disturbed(walked.model, 1, noise).model.layers[1].self_attn
    weight = attention.o_proj.weight.clone()
    calibration = walked.calibration
    before, healing = calibration.error(attention), calibration.heal(attention)
    assert torch.equal(attention.o_proj.weight, weight)
    assert healing.error_before == pytest.approx(before, rel=1e-6)
    assert healing.error_after <= healing.error_before
    assert (healing.weight is None) == (healing.error_after == healing.error_before)
    assert calibration.error(with_output(attention, healing.weight)) <= before
    if noise == 3:  # what the layer before did is mended by chance only, what was done to this one surely
        assert healing.error_after < 0.9 * before


@pytest.mark.parametrize("family", HEALED)
def test_a_halved_output_projection_is_healed(family: str) -> None:
    model = source_model(family, torch.float64)
    walk = walk_through(model)
    calibration = walk.calibrate(sources_of(model)[0])
    own = model.model.layers[0].self_attn
    attention = with_output(own, 0.5 * own.o_proj.weight)
    healing = calibration.heal(attention)
    assert healing.weight is not None
    assert healing.error_after < 0.05 * healing.error_before
    assert calibration.error(with_output(attention, healing.weight)) < 0.05 * healing.error_before
    # Much of what is left lies where the contexts hardly reach, so the weights themselves are only nearer.
    assert (healing.weight - own.o_proj.weight).norm() < 0.5 * (0.5 * own.o_proj.weight).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", HEALED)
def test_an_exact_candidate_is_not_made_worse(family: str, dtype: torch.dtype) -> None:
    model = source_model(family, dtype)
    sources, walk = sources_of(model), walk_through(model)
    for layer in range(LAYERS):
        calibration, attention = walk.calibrate(sources[layer]), model.model.layers[layer].self_attn
        healing = calibration.heal(attention)
        assert healing.error_after <= healing.error_before < 1e-5
        assert calibration.error(with_output(attention, healing.weight)) < 1e-5
        walk.advance()


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_few_windows_are_enough_to_heal(count: int) -> None:
    walked = Walked("llama", IDS[:count])
    healing = walked.calibration.heal(walked.layer.self_attn)
    assert healing.error_after <= healing.error_before
    after = walked.calibration.error(with_output(walked.layer.self_attn, healing.weight))
    assert after <= walked.calibration.error(walked.layer.self_attn)


def test_the_refit_is_ridge_regression() -> None:
    walked = Walked("qwen3")
    attention = disturbed(walked.model, 1).model.layers[1].self_attn
    fitted = [window for window in range(len(IDS)) if window not in HELD]
    contexts: list[Tensor] = []
    hook = attention.o_proj.register_forward_pre_hook(lambda _, args: contexts.append(args[0]))
    list(walked.walk.outputs(attention, walked.converted))
    hook.remove()
    target = middle_states(walked.model, 1) - walked.converted
    root = (1 / middle_states(walked.model, 1).square().mean(-1)).sqrt()[..., None]
    x, y = contexts[0] * root, target * root
    weight = attention.o_proj.weight

    def refit(windows: list[int], ridge: float) -> Tensor:
        """Least squares with rows √λ·I appended: a change is held near zero."""
        a, b = x[windows].flatten(0, 1), (y - x @ weight.T)[windows].flatten(0, 1)
        size = (ridge * a.square().sum() / a.shape[1]).sqrt()
        a = torch.cat([a, size * torch.eye(a.shape[1])])
        return weight + torch.linalg.lstsq(a, torch.cat([b, torch.zeros(a.shape[1], b.shape[1])])).solution.T

    def error(candidate: Tensor) -> float:
        return float((y - x @ candidate.T)[HELD].square().mean().sqrt())

    ridge = min((1e-3, 1e-2, 1e-1), key=lambda ridge: error(refit(fitted, ridge)))
    healing = walked.calibration.heal(attention)
    assert healing.weight is not None
    assert healing.error_before == pytest.approx(error(weight), rel=1e-6)
    assert healing.error_after == pytest.approx(error(refit(fitted, ridge)), rel=1e-6)
    assert torch.allclose(healing.weight, refit(list(range(len(IDS))), ridge), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("family", [*FAMILIES, "llama with biases"])
def test_contributions_are_the_source_models_own(family: str) -> None:
    model = source_model(family, torch.float64)
    sources, walk = sources_of(model), walk_through(model)
    changed = disturbed(model, 0)
    for index, states in enumerate(layer_inputs(model)[:-1]):
        layer: Any = model.model.layers[index]
        attention, x = layer.self_attn, layer.input_layernorm(states)
        query, key = (getattr(attention, f"{name}_proj")(x).unflatten(-1, (-1, HEAD_DIM)) for name in "qk")
        if hasattr(attention, "q_norm"):
            query, key = attention.q_norm(query), attention.k_norm(key)
        expected = torch.zeros(GROUPS, PAIRS, dtype=torch.float64)
        for head in range(HEADS):
            product = pairs(query[:, :, head]).abs() * pairs(key[:, :, head // 2]).abs()
            expected[head // 2] += product.mean((0, 1)) / 2
        assert torch.allclose(walk.calibrate(sources[index]).contribution(), expected, rtol=1e-9)
        # The source's states count, whatever was converted before.
        walk.advance(changed.model.layers[0].self_attn if index == 0 else None)


def big_tensors(walk: CalibrationWalk) -> int:
    """Different tensors of the states' shape that the walk holds, in containers too."""
    found: set[int] = set()
    pending = list(vars(walk).values())
    while pending:
        value = pending.pop()
        if isinstance(value, Tensor) and value.shape == walk.source.shape and value.is_floating_point():
            found.add(value.untyped_storage().data_ptr())
        elif isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list | tuple | set):
            pending += value
    return len(found)


@pytest.mark.parametrize("replaced", [False, True])
def test_memory_does_not_grow_with_the_layers(replaced: bool) -> None:
    model = source_model("llama", num_hidden_layers=6)
    sources, walk = sources_of(model), walk_through(model)
    fields = set(vars(walk))
    for layer in range(6):
        calibration: LayerCalibration = walk.calibrate(sources[layer])
        assert calibration.moments.inputs.isfinite().all()
        assert big_tensors(walk) <= 3
        assert set(vars(walk)) == fields
        walk.advance(model.model.layers[layer].self_attn if replaced else None)
    assert walk.layer == 6
    assert big_tensors(walk) <= 3
