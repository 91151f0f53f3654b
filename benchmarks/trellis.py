"""Try trellis codes in place of uniform ones, at equal bytes, in the codec of SmolLM2.

    python -m benchmarks.trellis [--encyclopedia FILE]

In trellis codes (Marcellin and Fischer, 1990) a channel's value is an entry of a table at the last eight bits of the
token's codes up to its own, and the encoder searches the path with the least error (Viterbi). The order of the table is
that of a hash, as in QTIP (arXiv 2406.11235). Axes, bits of the channels and everything else are those of the codec of
`benchmarks.exact_model`, and so are texts, prompts and chunks. Gains are either those that the encoder of uniform codes
chooses for each group of channels, or one of three for a token, whichever leaves the least error of the trellis codes.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.exact_model import codec_of, measured
from benchmarks.real_quality import windows_of
from benchmarks.result import CONFIGS, RESULTS, ROOT, save_result
from optimum_mla.codec import gains
from optimum_mla.codec.layout import GAIN_OCTAVES
from optimum_mla.codec.vectors import VectorCodec

STATES = 256
WINDOW_BITS = 8
TOKENS_AT_ONCE = 512
TOKEN_GAINS = (0.71, 1.0, 1.41)


def table() -> Tensor:
    """Return the values that the states stand for, [256]: quantiles of a normal distribution in the order of a hash."""
    place = (torch.arange(STATES) * 2654435761 % 2**20 + 12345) % STATES
    return torch.special.ndtri((torch.arange(STATES) + 0.5) / STATES)[place]


def search(
    values: Tensor, scales: Tensor, weights: Tensor, bits: list[int], factors: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the values of the best paths, [T, r], and their weighted errors, [T].

    Args:
        values: The values to code, [T, r].
        scales: What the table is multiplied by in each channel, [r].
        weights: Cost of a unit of squared error in each channel, [r].
        bits: Bits of each channel.
        factors: What the costs of each token are multiplied by, [T, r]; None for ones.
    """
    entries, count = table(), len(values)
    costs = torch.full((count, STATES), torch.inf)
    costs[:, 0] = 0
    pointers = []
    for channel, width in enumerate(bits):
        before, pointer = costs.view(count, 2**width, STATES >> width).min(1)
        pointers.append(pointer.to(torch.uint8))
        off = values[:, channel, None] - scales[channel] * entries
        weighted = off.square_().mul_(
            weights[channel] if factors is None else weights[channel] * factors[:, channel, None]
        )
        costs = before.repeat_interleave(2**width, dim=1).add_(weighted)
    error, state = costs.min(1)
    found = torch.empty_like(values)
    for channel in range(len(bits) - 1, -1, -1):
        width = bits[channel]
        found[:, channel] = scales[channel] * entries[state]
        low = state >> width
        state = pointers[channel].gather(1, low[:, None])[:, 0].long() << (WINDOW_BITS - width) | low
    return found, error


class Bytes(NamedTuple):
    """Stands for a layout where only the bytes of a token are asked for."""

    bytes_per_token: int


class TrellisCodec:
    """A codec with the axes and bits of another one, whose `encode` returns what trellis codes stand for, as bytes.

    So it says what the codes lose and not what they weigh, which is what the uniform codes of the same layout do.

    Args:
        codec: The codec with uniform codes.
        samples: Vectors to fit the scales of the table to, [T, w].
        groups: Whether the groups of channels have the gains of the uniform codes; otherwise a token has one of three.
        tried: Multiples of the channels' deviations that the scales may be; those with the least error are taken.
    """

    def __init__(self, codec: VectorCodec, samples: Tensor, groups: bool, tried: list[float]) -> None:
        self.codec, self.width, self.groups = codec, codec.width, groups
        self.layout = Bytes(4 * codec.width)
        self.bits = [bits for bits, channels in codec.layout.channels for _ in range(channels)]
        latents = self._latents(samples)
        deviation = (latents / self._group_gains(latents)).square().mean(0).sqrt()
        errors: list[float] = []
        for factor in (*tried, 0.0):
            self.scales = (factor or tried[errors.index(min(errors))]) * deviation
            errors.append(float(self._coded(latents)[1].sum()))
        self.error = errors[-1] / len(latents)
        uniform = gains.decode(gains.encode(latents, codec.layout, codec.weight), codec.layout)
        self.uniform_error = float(((uniform - latents).square() @ codec.weight).mean())

    def to(self, device: Any) -> TrellisCodec:
        """Return the codec, which is on the CPU."""
        return self

    def _latents(self, vectors: Tensor) -> Tensor:
        return (vectors.float() - self.codec.centre) @ self.codec.latent_down.mT

    def _group_gains(self, latents: Tensor) -> Tensor:
        """Return the gain of each channel that the encoder of uniform codes chooses, [T, r], or ones."""
        layout = self.codec.layout
        if not self.groups:
            return torch.ones_like(latents)
        chosen = gains.encode(latents, layout, self.codec.weight)[:, layout.num_channels :]
        return torch.exp2(chosen * GAIN_OCTAVES)[:, list(layout.groups)]

    def _coded(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the trellis codes of latents stand for, [T, r], and their weighted errors, [T]."""
        weight = self.codec.weight
        if self.groups:
            # The weights of a token's channels grow with their gains; the search takes those of each token.
            gain = self._group_gains(latents)
            found, _ = search(latents / gain, self.scales, weight, self.bits, gain.square())
            found = found * gain
            return found, (found - latents).square() @ weight
        best, least = torch.zeros_like(latents), torch.full((len(latents),), torch.inf)
        for factor in TOKEN_GAINS:
            found, _ = search(latents / factor, self.scales, weight, self.bits)
            found = found * factor
            error = (found - latents).square() @ weight
            best, least = torch.where((error < least)[:, None], found, best), torch.minimum(error, least)
        return best, least

    @torch.no_grad()
    def encode(self, vectors: Tensor) -> Tensor:
        """Return what the codes of vectors [B, T, w] stand for, as bytes, [B, 4·w, T]."""
        flat = self._latents(vectors).flatten(0, -2)
        found = torch.cat([self._coded(part)[0] for part in flat.split(TOKENS_AT_ONCE)])
        again = found @ self.codec.latent_up.mT + self.codec.centre
        return again.unflatten(0, vectors.shape[:-1]).contiguous().view(torch.uint8).mT

    def decode(self, packed: Tensor) -> Tensor:
        """Return these vectors, [B, T, w]."""
        return packed.mT.contiguous().view(torch.float32)


def samples_of(model: Any, tokenizer: Any, config: dict[str, Any], count: int) -> dict[int, Tensor]:
    """Return the keys and values of the calibration text by layer, [T, w] each."""
    from optimum_mla.calibrate import built_in_windows
    from optimum_mla.calibrate.walk import CalibrationWalk
    from optimum_mla.models.layer_source import LayerSource

    walk = CalibrationWalk(LayerSource(model), built_in_windows(tokenizer, config["calibration_length"], count))
    found = {}
    for layer in range(walk.model.num_layers):
        inputs = walk.some_inputs(torch.arange(len(walk.windows)), 4, 4096)
        heads = walk.model.attention(layer).project(inputs[None])
        found[layer] = torch.cat([part[0].transpose(0, 1).flatten(1) for part in (heads.key, heads.value)], dim=1)
        walk.advance()
    return found


@torch.no_grad()
def main() -> None:
    """Measure the codec with uniform and with trellis codes, and write the result."""
    parser = argparse.ArgumentParser(description="Measure trellis codes beside uniform ones.")
    parser.add_argument("--encyclopedia", type=Path)
    args = parser.parse_args()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from optimum_mla.models.codec import ModelCodec

    own = json.loads((CONFIGS / "trellis.json").read_text(encoding="utf-8"))
    config = json.loads((CONFIGS / "exact_model.json").read_text(encoding="utf-8"))
    folder = str(ROOT / config["model"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    codec = ModelCodec.load(codec_of(config, own["codec"]))
    windows = windows_of(config, model, tokenizer, args.encyclopedia)
    known: dict[Any, Any] = {}
    samples = samples_of(model, tokenizer, config, own["sample_windows"])
    rows = []
    for name in ("uniform", *own["gains"]):
        made, begun = codec, time.process_time()
        if name != "uniform":
            layers: Any = {
                layer: TrellisCodec(one, samples[layer], name == "by group", own["scales"])
                for layer, one in codec.layers.items()
            }
            made = replace(codec, layers=layers)
        cache = lambda made=made: made.make_cache(model)  # noqa: E731
        row = {"codes": "uniform" if name == "uniform" else "trellis", "gains": name}
        row |= {"texts": measured(config, model, windows, cache, known)["texts"]}
        if name != "uniform":
            row["error_of_uniform_percent"] = [100 * one.error / one.uniform_error for one in layers.values()]
        rows.append({**row, "cpu_seconds": time.process_time() - begun})
        print(rows[-1], flush=True)
    save_result(RESULTS / "trellis.json", own, rows=rows)


if __name__ == "__main__":
    main()
