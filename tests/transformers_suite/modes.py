"""What the distribution of Transformers has no tests for: ways to generate, cache classes and exporters.

Each mode runs a model in one way and says what must come out: what the same model gives in a plainer way, most often
without any cache.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, QuantizedCache, StaticCache

from optimum_mla.models import family_of
from optimum_mla.models.layers import model_geometry
from optimum_mla.stack import cache_argument, cache_of
from tests.transformers_suite.families import SIZES, model_class, tiny_config

NEW_TOKENS = 8
PROMPT = 8
PADDING = 3
WINDOWS = {"Mistral": {"sliding_window": 6}}
"""Windows shorter than a prompt, for families that have them."""
QUANTIZED = {"nbits": 4, "q_group_size": 8, "residual_length": 4}


def build(family: str, form: str) -> PreTrainedModel:
    """Return a model with random weights, large enough that its tokens vary, and without an end-of-sequence token.

    The same weights come out at every call.
    """
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        config = tiny_config(family, form, eos_token_id=None, **WINDOWS.get(family, {}))
        model = model_class(family, form, "ForCausalLM")(config).eval()
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape))
    return model


def prompts(batch: int = 2) -> Tensor:
    """Return token ids [batch, PROMPT]; the second half repeats the first, so that a lookup finds something."""
    generator = torch.Generator().manual_seed(2)
    half = torch.randint(3, SIZES["vocab_size"], (batch, PROMPT // 2), generator=generator)
    return torch.cat((half, half), dim=1)


def generate(model: PreTrainedModel, ids: Tensor | None = None, **options: Any) -> Any:
    """Generate NEW_TOKENS tokens, by greedy search unless `options` say otherwise; samples are drawn from seed 0."""
    torch.manual_seed(0)
    ids = prompts() if ids is None else ids
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "attention_mask": torch.ones_like(ids), **options}
    return model.generate(ids, **settings)


def without_cache(model: PreTrainedModel, **options: Any) -> Tensor:
    """Return the tokens that the model gives when it computes everything anew at each step."""
    tokens: Tensor = generate(model, use_cache=False, **options)
    return tokens


def one_prompt(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return `run` for one prompt, where a mode takes no batch."""
    return lambda model, **options: run(model, ids=prompts(1), **options)


@dataclass(frozen=True)
class Mode:
    """One way to run a model.

    Args:
        run: Takes a language model.
        expected: Takes the same model and returns what `run` must give.
        tolerance: The largest absolute difference; zero compares tokens.
        exact: Whether a model that was converted at full rank must give what its source gives, in this mode too.
    """

    run: Callable[[PreTrainedModel], Tensor]
    expected: Callable[[PreTrainedModel], Tensor]
    tolerance: float = 0.0
    exact: bool = True


def generation(tokens: Callable[..., Tensor] = generate, **options: Any) -> Mode:
    """Return a mode whose tokens are those of the same search without a cache."""
    return Mode(lambda model: tokens(model, **options), lambda model: without_cache(model, **options))


def as_greedy(**options: Any) -> Mode:
    """Return a mode whose tokens are those of greedy search without a cache."""
    return Mode(lambda model: generate(model, **options), without_cache)


def as_greedy_for_one(options: Callable[[PreTrainedModel], dict[str, Any]]) -> Mode:
    """Return a mode that takes one prompt only and gives greedy search's tokens."""
    return Mode(
        lambda model: generate(model, prompts(1), **options(model)), lambda model: without_cache(model, ids=prompts(1))
    )


def assistant(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model that guesses right often but not always: the same weights with some noise."""
    guessing = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in guessing.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return guessing


def padded(model: PreTrainedModel) -> Tensor:
    """Return the tokens that follow prompts of which the first has padding on its left."""
    ids, mask = prompts(), torch.ones_like(prompts())
    ids[0, :PADDING], mask[0, :PADDING] = SIZES["pad_token_id"], 0
    tokens: Tensor = generate(model, ids, attention_mask=mask)[:, PROMPT:]
    return tokens


def row_by_row(model: PreTrainedModel) -> Tensor:
    """Return the tokens that follow the same prompts, each alone and without padding."""
    first, second = prompts()[:1, PADDING:], prompts()[1:]
    rows = [without_cache(model, ids=ids)[:, ids.shape[1] :] for ids in (first, second)]
    return torch.cat(rows)


def from_embeddings(model: PreTrainedModel) -> Tensor:
    """Return the tokens that follow prompts given as embeddings."""
    embeddings = model.get_input_embeddings()(prompts()).detach()
    tokens: Tensor = model.generate(inputs_embeds=embeddings, max_new_tokens=NEW_TOKENS, do_sample=False)
    return torch.cat((prompts(), tokens), dim=1)


def continued(model: PreTrainedModel) -> Tensor:
    """Return the tokens of two calls, the second of which goes on with the first one's cache."""
    half = generate(model, max_new_tokens=NEW_TOKENS // 2, return_dict_in_generate=True)
    rest = {"max_new_tokens": NEW_TOKENS - NEW_TOKENS // 2, **cache_argument(model, cache_of(half))}
    tokens: Tensor = generate(model, half.sequences, **rest)
    return tokens


def given_cache(make: Callable[[PreTrainedModel], Any]) -> Mode:
    """Return a mode that hands a cache object to `generate`."""
    return Mode(lambda model: generate(model, **cache_argument(model, make(model))), without_cache)


def scores(model: PreTrainedModel, **options: Any) -> Tensor:
    """Return the logits of every step of greedy search, [steps, B, vocabulary]."""
    output = generate(model, return_dict_in_generate=True, output_logits=True, **options)
    return torch.stack(output.logits)


def shapes(model: PreTrainedModel, **options: Any) -> Tensor:
    """Return the shapes of everything that `generate` can be asked to return, the cache left out."""
    wanted = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
    model.set_attn_implementation("eager")
    output = generate(model, return_dict_in_generate=True, **dict.fromkeys(wanted, True), **options)
    model.set_attn_implementation("sdpa")
    numbers: list[int] = [*output.sequences.shape]
    for steps in (output.scores, output.logits):
        numbers += [size for step in steps for size in step.shape]
    for layered in (output.attentions, output.hidden_states):
        numbers += [size for step in layered for layer in step for size in layer.shape]
    return torch.tensor(numbers)


def expected_shapes(model: PreTrainedModel) -> Tensor:
    """Return the shapes that a model of these sizes has to return, counted by hand."""
    batch, layers = 2, SIZES["num_hidden_layers"]
    lengths = [PROMPT, *[1] * (NEW_TOKENS - 1)]
    numbers = [batch, PROMPT + NEW_TOKENS]
    numbers += [batch, SIZES["vocab_size"]] * NEW_TOKENS * 2
    window = getattr(model.config, "sliding_window", None) or PROMPT + NEW_TOKENS
    for step, length in enumerate(lengths):
        # A prompt is seen whole; after it, a layer with a window holds no more than the window.
        keys = min(PROMPT + step, window) if step else PROMPT
        numbers += [batch, SIZES["num_attention_heads"], length, keys] * layers
    for length in lengths:
        numbers += [batch, length, SIZES["hidden_size"]] * (layers + 1)
    return torch.tensor(numbers)


@torch.no_grad()
def chunked(model: PreTrainedModel, cache: Callable[[PreTrainedModel], Any]) -> Tensor:
    """Return the logits of a prompt that is fed to a cache in three pieces."""
    held = cache(model)
    bounds = [0, 4, 5, PROMPT]
    pieces = [
        model(prompts()[:, start:end], use_cache=True, **cache_argument(model, held)).logits
        for start, end in pairwise(bounds)
    ]
    return torch.cat(pieces, dim=1)


@torch.no_grad()
def whole(model: PreTrainedModel) -> Tensor:
    """Return the logits of the prompt without a cache."""
    logits: Tensor = model(prompts(), use_cache=False).logits
    return logits


@torch.no_grad()
def cropped(model: PreTrainedModel) -> Tensor:
    """Return the logits of a prompt whose second half was fed twice, the cache cropped in between."""
    held = default_cache(model)
    model(prompts(), use_cache=True, **cache_argument(model, held))
    held.crop(4 - PROMPT)  # how many tokens to remove, with a minus sign
    rest = model(prompts()[:, 4:], use_cache=True, **cache_argument(model, held)).logits
    return torch.cat((whole(model)[:, :4], rest), dim=1)


@torch.no_grad()
def selected(model: PreTrainedModel) -> Tensor:
    """Return the logits after a cache's rows were repeated, reordered and selected."""
    held = default_cache(model)
    model(prompts()[:, :-1], use_cache=True, **cache_argument(model, held))
    held.batch_repeat_interleave(2)  # rows 0 0 1 1
    held.reorder_cache(torch.tensor([3, 2, 1, 0]))  # rows 1 1 0 0
    held.batch_select_indices(torch.tensor([0, 2]))  # rows 1 0
    last = model(prompts()[[1, 0], -1:], use_cache=True, **cache_argument(model, held)).logits
    return last[[1, 0], -1]


@torch.no_grad()
def selected_by_a_mask(model: PreTrainedModel) -> Tensor:
    """Return the logits of one row after the cache's other row was dropped by a boolean mask."""
    held = default_cache(model)
    model(prompts()[:, :-1], use_cache=True, **cache_argument(model, held))
    held.batch_select_indices(torch.tensor([False, True]))
    logits: Tensor = model(prompts()[1:, -1:], use_cache=True, **cache_argument(model, held)).logits[:, -1]
    return logits


@torch.no_grad()
def numbers_by_iteration(model: PreTrainedModel) -> Tensor:
    """Return how many numbers a cache holds after a prompt, counted by iterating over its layers."""
    held = default_cache(model)
    model(prompts(), use_cache=True, **cache_argument(model, held))
    return torch.tensor(sum(keys.numel() + values.numel() for keys, values, *_ in held))


def numbers_by_shape(model: PreTrainedModel) -> Tensor:
    """Return how many numbers a cache holds after a prompt, counted from the config."""
    window = getattr(model.config, "sliding_window", None)
    tokens = PROMPT if window is None else min(PROMPT, window - 1)
    return torch.tensor(2 * tokens * model_geometry(family_of(model.config).spec, model.config).cache_numbers)


def steps(model: PreTrainedModel, cache: Any, gradients: bool) -> Tensor:
    """Return the logits of a prompt and three steps after it.

    Args:
        gradients: Leave gradients enabled, as a plain call of a model does.
    """
    bounds = [0, PROMPT - 3, PROMPT - 2, PROMPT - 1, PROMPT]
    with torch.set_grad_enabled(gradients):
        pieces = [
            model(prompts()[:, start:end], use_cache=True, **cache_argument(model, cache)).logits
            for start, end in pairwise(bounds)
        ]
    return torch.cat(pieces, dim=1).detach()


def quantized_cache(model: PreTrainedModel) -> Any:
    """Return a cache of 4 bits: ours with settings, or Transformers' for a source model."""
    make = getattr(model, "make_cache", None)
    if make is None:
        return QuantizedCache("hqq", model.config, **QUANTIZED)
    return make(bits=4, residual_length=QUANTIZED["residual_length"])


def default_cache(model: PreTrainedModel) -> Any:
    """Return the cache that a plain call of the model makes: ours, or a `DynamicCache` for a source model."""
    make = getattr(model, "make_cache", None)
    return DynamicCache(config=model.config) if make is None else make()


def static_cache(model: PreTrainedModel) -> StaticCache:
    """Return an empty cache of fixed length."""
    return StaticCache(config=model.config, max_cache_len=PROMPT + NEW_TOKENS)


@torch.no_grad()
def autocast(model: PreTrainedModel) -> Tensor:
    """Return the first tokens under bfloat16 autocast, with the default cache: that it runs, and prefill's choice."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens: Tensor = generate(model)
    assert tokens.shape == (2, PROMPT + NEW_TOKENS)
    return tokens[:, : PROMPT + 1]


@torch.no_grad()
def autocast_without_cache(model: PreTrainedModel) -> Tensor:
    """Return the first tokens under bfloat16 autocast, without a cache."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return without_cache(model, max_new_tokens=1)


def with_gradients(model: PreTrainedModel) -> Tensor:
    """Return the gradient of the embeddings through a prompt and a step after it, which reads the cache."""
    model.zero_grad()
    held = default_cache(model)
    model(prompts()[:, :-1], use_cache=True, **cache_argument(model, held))
    model(prompts()[:, -1:], use_cache=True, **cache_argument(model, held)).logits.logsumexp(-1).sum().backward()
    gradient = model.get_input_embeddings().weight.grad
    assert gradient is not None
    return gradient.clone()


def with_gradients_in_one_pass(model: PreTrainedModel) -> Tensor:
    """Return the same gradient from one pass without a cache."""
    model.zero_grad()
    model(prompts(), use_cache=False).logits[:, -1].logsumexp(-1).sum().backward()
    gradient = model.get_input_embeddings().weight.grad
    assert gradient is not None
    return gradient.clone()


@torch.no_grad()
def exported(model: PreTrainedModel) -> Tensor:
    """Return the logits of a program made by `torch.export`, without a cache."""
    inputs = {"input_ids": prompts(), "attention_mask": torch.ones_like(prompts())}
    program = torch.export.export(model, (), {**inputs, "use_cache": False}, strict=False)
    logits: Tensor = program.module()(**inputs, use_cache=False).logits
    return logits


class StaticStep(torch.nn.Module):
    """A model with a static cache among its buffers, for export; one prompt, one token a call.

    Transformers' own wrapper (`TorchExportableModuleWithStaticCache`) allocates keys and values of one size, which no
    latent cache has, DeepSeek's included. Here a first call allocates what the model caches.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model, self.held = model, static_cache(model)
        model(prompts(1)[:, :1], use_cache=True, **cache_argument(model, self.held))
        self.held.reset()
        for index, layer in enumerate(self.held.layers):
            self.register_buffer(f"keys_{index}", layer.keys, persistent=False)
            self.register_buffer(f"values_{index}", layer.values, persistent=False)
            self.register_buffer(f"length_{index}", layer.cumulative_length, persistent=False)

    def forward(self, input_ids: Tensor, position: Tensor) -> Tensor:
        """Return the logits of one token [1, 1] at a position [1]."""
        inputs = {"position_ids": position[None], "use_cache": True, **cache_argument(self.model, self.held)}
        logits: Tensor = self.model(input_ids, **inputs).logits
        return logits


@torch.no_grad()
def exported_with_a_static_cache(model: PreTrainedModel) -> Tensor:
    """Return the logits of a program that holds a static cache, fed one token at a time."""
    module, ids = StaticStep(copy.deepcopy(model)), prompts(1)
    # Only a strict trace keeps the cache's length, which steps change, apart from the program's constants.
    program = torch.export.export(module, (ids[:, :1], torch.tensor([0])), strict=True).module()
    return torch.cat([program(ids[:, at : at + 1], torch.tensor([at])) for at in range(PROMPT)], dim=1)


@torch.no_grad()
def by_the_dynamo_exporter(model: PreTrainedModel, cache: bool) -> Tensor:
    """Return the logits of Transformers' own exporter's program.

    Args:
        cache: Export one step after a prompt, with the default cache as an input; else the whole prompt without one.
    """
    from transformers.exporters.configs import DynamoConfig
    from transformers.exporters.exporter_dynamo import DynamoExporter

    inputs: dict[str, Any] = {"input_ids": prompts(), "attention_mask": torch.ones_like(prompts()), "use_cache": False}
    if cache:
        held = cache_of(model(prompts()[:, :-1], use_cache=True))
        inputs |= {"input_ids": prompts()[:, -1:], "use_cache": True, **cache_argument(model, held)}
    program, _ = DynamoExporter().export_program(copy.deepcopy(model), copy.deepcopy(inputs), DynamoConfig())
    del inputs["use_cache"]
    logits: Tensor = program.module()(**inputs).logits
    return logits


CLOSE = 1e-4
MODES: dict[str, Mode] = {
    "greedy search": generation(),
    "sampling": generation(do_sample=True),
    "several samples of a prompt": generation(do_sample=True, num_return_sequences=3, top_k=20, top_p=0.9),
    "beam search": generation(num_beams=3),
    "beam sampling": generation(num_beams=3, do_sample=True),
    "several beams returned": generation(num_beams=4, num_return_sequences=3, length_penalty=0.5),
    "logits processors": generation(repetition_penalty=1.3, no_repeat_ngram_size=2, min_new_tokens=4),
    "assisted by another model": as_greedy_for_one(lambda model: {"assistant_model": assistant(model)}),
    "assisted by its own first layer": as_greedy_for_one(lambda model: {"assistant_early_exit": 1}),
    "prompt lookup": as_greedy_for_one(lambda model: {"prompt_lookup_num_tokens": 3}),
    "chunked prefill": as_greedy(prefill_chunk_size=4),
    "left padding": Mode(padded, row_by_row),
    "prompts as embeddings": Mode(from_embeddings, without_cache),
    "continued from a cache": Mode(continued, without_cache),
    "returned shapes": Mode(shapes, expected_shapes, exact=False),
    "returned logits": Mode(scores, lambda model: scores(model, use_cache=False), CLOSE),
    "dynamic cache": as_greedy(cache_implementation="dynamic"),
    "static cache": as_greedy(cache_implementation="static"),
    "static cache, beam search": Mode(
        lambda model: generate(model, cache_implementation="static", num_beams=3),
        lambda model: without_cache(model, num_beams=3),
    ),
    "a DynamicCache handed over": given_cache(lambda model: DynamicCache(config=model.config)),
    "a StaticCache handed over": given_cache(static_cache),
    "prompt in pieces, default cache": Mode(lambda model: chunked(model, default_cache), whole, CLOSE),
    "prompt in pieces, static cache": Mode(lambda model: chunked(model, static_cache), whole, CLOSE),
    "cache cropped": Mode(cropped, whole, CLOSE),
    "rows of a cache repeated, reordered, selected": Mode(selected, lambda model: whole(model)[:, -1], CLOSE),
    "rows of a cache selected by a mask": Mode(selected_by_a_mask, lambda model: whole(model)[1:, -1], CLOSE),
    "a cache iterated": Mode(numbers_by_iteration, numbers_by_shape, exact=False),
    "steps with gradients enabled": Mode(
        lambda model: steps(model, default_cache(model), True), whole, CLOSE, exact=False
    ),
    "steps with gradients enabled, quantized cache": Mode(
        lambda model: steps(model, quantized_cache(model), True),
        lambda model: steps(model, quantized_cache(model), False),
        CLOSE,
        exact=False,
    ),
    # What a quantized cache gives is close to nothing exact; its first token comes from the prompt's own numbers.
    "quantized cache, hqq": Mode(
        lambda model: generate(model, cache_implementation="quantized", cache_config={"backend": "hqq", **QUANTIZED})[
            :, : PROMPT + 1
        ],
        lambda model: without_cache(model, max_new_tokens=1),
    ),
    "quantized cache, quanto": Mode(
        lambda model: generate(
            model,
            cache_implementation="quantized",
            cache_config={"backend": "quanto", **QUANTIZED},
        )[:, : PROMPT + 1],
        lambda model: without_cache(model, max_new_tokens=1),
    ),
    "bfloat16 autocast": Mode(autocast, autocast_without_cache, exact=False),
    "gradients through a cache": Mode(with_gradients, with_gradients_in_one_pass, CLOSE),
    "torch.export": Mode(exported, whole, CLOSE),
    "torch.export with a static cache": Mode(exported_with_a_static_cache, lambda model: whole(model)[:1], CLOSE),
    "Dynamo exporter": Mode(lambda model: by_the_dynamo_exporter(model, False), whole, CLOSE),
    "Dynamo exporter, a step with the default cache": Mode(
        lambda model: by_the_dynamo_exporter(model, True), lambda model: whole(model)[:, -1:], CLOSE
    ),
}
"""Every mode by its name."""
