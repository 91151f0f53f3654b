"""Measure the time and memory of one decoding step at long context, beside the source model with its `DynamicCache`.

    python -m benchmarks.decode [--config ...] [--output ...] [--plot ...]

The models are slices of large ones with random weights, because values do not change the work. Caches are filled with
random tokens and not by a prefill. All variants of a shape and context are timed in turn, step by step, in one process.
A time is the median over the steps of a variant, and its ratio to that of the source matters most. `core` is the part
between the projections: the update of the cache, the logits and the weighted sum (for latents with the folded
up-projections), as a mean over the layers.

The memory that a step takes for its duration is the rise of the highest resident memory of a process of its own, in
which the memory of every larger tensor returns to the system when the tensor dies. On CUDA it is the peak of the
allocator.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.result import CONFIGS, RESULTS, ROOT, save_result

STEPS = 9
SECONDS_PER_VARIANT = 6.0
"""A variant is not timed any more after so many seconds and at least `FEWEST_STEPS` steps."""
FEWEST_STEPS = 3
FLUSH_STEPS = 128
SMALL_VOCABULARY = 1024
LONGEST = 40960
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Settings with which the C library returns larger blocks at once, so that the highest resident memory shows them."""


class Variant:
    """A model with a filled cache, whose decoding step is timed.

    Args:
        shape: An entry of the config's `shapes`.
        latent: An entry of its `latents`, or None for the source model.
        kind: One of the config's `variants`, or `source`.
        context: Number of tokens in the cache.
        dtype: Name of the torch dtype.
        models: The models made so far, by latent, which the variants of a shape share.
    """

    def __init__(
        self, shape: dict[str, Any], latent: dict[str, Any] | None, kind: str, context: int, dtype: str, models: Any
    ) -> None:
        import torch

        self.shape, self.latent, self.kind = shape, latent, kind
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = getattr(torch, dtype)
        key = latent["name"] if latent else "source"
        if key not in models:
            models[key] = self._model()
        self.model = models[key]
        self.cache = self._cache()
        self._fill(context)
        self.context = context
        self.token = torch.ones(1, 1, dtype=torch.long, device=self.device)

    def _model(self) -> Any:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from optimum_mla.models import family_of

        family = family_of(LlamaConfig())
        common = {**self.shape["source"], "vocab_size": SMALL_VOCABULARY, "max_position_embeddings": LONGEST}
        torch.manual_seed(0)
        with torch.device(self.device):
            if self.latent is None:
                model = LlamaForCausalLM(LlamaConfig(**common))
            else:
                latent = {name: value for name, value in self.latent.items() if name != "name"}
                model = family.model(family.config(**common, attention_form="decoupled", **latent))
        return model.to(self.dtype).eval()

    def _cache(self) -> Any:
        from transformers import DynamicCache, QuantizedCache

        if self.kind in ("source", "expanded"):
            return DynamicCache(config=self.model.config)
        if self.kind == "absorbed":
            return self.model.make_cache()
        if self.kind.startswith("int4 "):
            return self.model.make_cache(bits=4, backend=self.kind.removeprefix("int4 "))
        return QuantizedCache("hqq", self.model.config, nbits=4, axis_key=1, axis_value=1)

    def _random(self, *size: int) -> Any:
        import torch

        return torch.randn(1, *size, device=self.device, dtype=self.dtype)

    def _new(self, tokens: int) -> tuple[Any, Any]:
        source = self.shape["source"]
        if self.latent is None:
            size = source["num_key_value_heads"], tokens, source["head_dim"]
            return self._random(*size), self._random(*size)
        rope = 0 if self.latent.get("rope_cache") == "rebuilt" else self.latent["qk_rope_head_dim"]
        return self._random(1, tokens, self.latent["kv_lora_rank"]), self._random(1, tokens, rope)

    def _fill(self, context: int) -> None:
        for layer in range(self.shape["source"]["num_hidden_layers"]):
            if hasattr(self.cache, "update_blocks"):
                self.cache.update_blocks(*self._new(context), layer)
            else:
                self.cache.update(*self._new(context), layer)

    def step(self) -> None:
        """Run one token through the whole model."""
        from optimum_mla.stack import cache_argument

        self.model(self.token, **cache_argument(self.model, self.cache), use_cache=True)

    def core_step(self) -> None:
        """Run the part between the projections for every layer."""
        import torch

        position = torch.full((1, 1), self.cache.get_seq_length(), device=self.device)
        like = self._random(1, 1)
        table = self.model.model.rotary_emb(like, position)
        for layer, block in enumerate(self.model.model.layers):
            attention = block.self_attn
            heads = self.shape["source"]["num_attention_heads"]
            if self.latent is None:
                from transformers.integrations.sdpa_attention import sdpa_attention_forward

                queries = self._random(heads, 1, self.shape["source"]["head_dim"])
                keys, values = self.cache.update(*self._new(1), layer)
                sdpa_attention_forward(attention, queries, keys, values, None, scaling=attention.scaling)
            else:
                queries = self._random(heads, 1, attention.geometry.qk_head_dim)
                attention.attend(queries, self._new(1), attention._rotation(table), None, self.cache, position)

    def prepared(self) -> None:
        """Make the attention modules compute in the way of this variant."""
        for block in self.model.model.layers:
            if self.kind == "expanded":
                block.self_attn._absorbing_saves = lambda queries, tokens: False
            elif "_absorbing_saves" in vars(block.self_attn):
                del block.self_attn._absorbing_saves


def timed(variants: list[Variant], step: Callable[[Variant], None]) -> list[dict[str, float]]:
    """Time the variants in turn, and return the median milliseconds of a step and the quartile spread of each."""
    import torch

    times: list[list[float]] = [[] for _ in variants]
    for round_ in range(STEPS + 1):
        for variant, taken in zip(variants, times, strict=True):
            if sum(taken) > SECONDS_PER_VARIANT and len(taken) >= FEWEST_STEPS:
                continue
            variant.prepared()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            step(variant)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_:  # the first round warms up
                taken.append(time.perf_counter() - start)
    return [
        {
            "ms": 1e3 * median(taken),
            "ms_quartile_spread": 1e3 * (sorted(taken)[(3 * len(taken)) // 4] - sorted(taken)[len(taken) // 4]),
            "steps": len(taken),
        }
        for taken in times
    ]


def with_flushes(variant: Variant) -> float | None:
    """Return the mean milliseconds of a core step with the steps that quantize tokens, which the median hides.

    As many steps are timed as any of the caches takes until it quantizes. None if the cache is not quantized.
    """
    if variant.kind in ("source", "absorbed", "expanded"):
        return None
    variant.prepared()
    start = time.perf_counter()
    for _ in range(FLUSH_STEPS):
        variant.core_step()
    return 1e3 * (time.perf_counter() - start) / FLUSH_STEPS


def cases(config: dict[str, Any], shape: dict[str, Any]) -> list[tuple[dict[str, Any] | None, str]]:
    """Return the source model and every variant of every latent.

    The quantized cache of Transformers cannot hold the empty tensors of a rebuilt rotary key, so it is left out there.
    """
    found: list[tuple[dict[str, Any] | None, str]] = [(None, "source")]
    for latent in shape["latents"]:
        for kind in config["variants"]:
            if kind == "Transformers QuantizedCache" and latent.get("rope_cache") == "rebuilt":
                continue
            found.append((latent, kind))
    return found


def step_memory(config: dict[str, Any], shape: int, latent: str, kind: str, context: int) -> float:
    """Return the megabytes that a step takes for its duration, measured in a process of its own."""
    case = json.dumps({"config": config, "shape": shape, "latent": latent, "kind": kind, "context": context})
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.decode", "--memory-case", case],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, **GIVE_BACK},
    )
    return float(done.stdout.splitlines()[-1])


def measure_memory(case: dict[str, Any]) -> float:
    """Return the megabytes that a step takes; `step_memory` runs this in its process."""
    import torch

    shape = case["config"]["shapes"][case["shape"]]
    latent = next((entry for entry in shape["latents"] if entry["name"] == case["latent"]), None)
    variant = Variant(shape, latent, case["kind"], case["context"], case["config"]["dtype"], {})
    variant.prepared()
    with torch.no_grad():
        variant.step()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            allocated = torch.cuda.memory_allocated()
            variant.step()
            return (torch.cuda.max_memory_allocated() - allocated) / 1e6
        Path("/proc/self/clear_refs").write_text("5")  # the mark starts again from what is resident now
        before = _resident("VmRSS")
        variant.step()
        return (_resident("VmHWM") - before) / 1e3


def _resident(field: str) -> float:
    """Kilobytes, from the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(field)).split()[1])


def run(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Every shape at every context."""
    import torch

    from optimum_mla.measure.memory import live_cache_bytes

    runs: list[dict[str, Any]] = []
    for index, shape in enumerate(config["shapes"]):
        models: dict[str, Any] = {}
        for context in config["contexts"]:
            with torch.no_grad():
                variants = [
                    Variant(shape, latent, kind, context, config["dtype"], models)
                    for latent, kind in cases(config, shape)
                ]
                cache_bytes = [live_cache_bytes(variant.cache) for variant in variants]
                whole = timed(variants, Variant.step)
                core = timed(variants, Variant.core_step)
                flushing = context in config["flush_contexts"]
                flushed = [with_flushes(variant) if flushing else None for variant in variants]
            rows = list(zip(variants, cache_bytes, whole, core, flushed, strict=True))
            del variants
            for variant, weight, model_time, core_time, mean in rows:
                name = variant.latent["name"] if variant.latent else "-"
                layers = shape["source"]["num_hidden_layers"]
                runs.append(
                    {
                        "shape": shape["name"],
                        "latent": name,
                        "variant": variant.kind,
                        "context": context,
                        "cache_mb": weight / 1e6,
                        "model_ms": model_time["ms"],
                        "model_ms_quartile_spread": model_time["ms_quartile_spread"],
                        "core_ms_per_layer": core_time["ms"] / layers,
                        "core_ms_quartile_spread": core_time["ms_quartile_spread"] / layers,
                        "core_ms_with_flushes_per_layer": None if mean is None else mean / layers,
                        "steps": core_time["steps"],
                        "model_speedup": whole[0]["ms"] / model_time["ms"],
                        "core_speedup": core[0]["ms"] / core_time["ms"],
                    }
                )
                variant.cache = None
            rows.clear()
            for entry in runs:
                if entry["shape"] == shape["name"] and entry["context"] == context:
                    memory = None
                    if context in config["memory_contexts"]:
                        memory = step_memory(config, index, entry["latent"], entry["variant"], context)
                    entry["step_memory_mb"] = memory
                    print(
                        f"{entry['shape']:20} {context:6} {entry['latent']:16} {entry['variant']:28}"
                        f" core {entry['core_ms_per_layer']:8.2f} ms ({entry['core_speedup']:5.2f} x)"
                        f" model {entry['model_ms']:8.1f} ms ({entry['model_speedup']:5.2f} x)"
                        f" cache {entry['cache_mb']:8.1f} MB step {memory or math.nan:7.1f} MB",
                        flush=True,
                    )
    return runs


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw the speed of the core against the context, with one panel per shape, and save the plot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys(entry["shape"] for entry in runs))
    figure, panels = pyplot.subplots(1, len(shapes), figsize=(6.2 * len(shapes), 4.6), squeeze=False)
    styles = {
        "absorbed": "-",
        "expanded": ":",
        "int4 hqq": "--",
        "int4 quanto": "-.",
        "Transformers QuantizedCache": ":",
    }
    for panel, shape in zip(panels[0], shapes, strict=True):
        mine = [entry for entry in runs if entry["shape"] == shape and entry["variant"] != "source"]
        latents = list(dict.fromkeys(entry["latent"] for entry in mine))
        for latent, colour in zip(latents, ("tab:blue", "tab:orange", "tab:green"), strict=False):
            for variant in ("absorbed", "int4 hqq", "Transformers QuantizedCache"):
                line = [entry for entry in mine if (entry["latent"], entry["variant"]) == (latent, variant)]
                if line:
                    panel.plot(
                        [entry["context"] for entry in line],
                        [entry["core_speedup"] for entry in line],
                        styles[variant],
                        color="grey" if variant.startswith("Tr") else colour,
                        marker="o",
                        label=f"{latent}, {variant}",
                    )
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set(xscale="log", yscale="log", xlabel="context, tokens", title=shape)
        panel.set_ylabel("attention core, times as fast as the source")
        panel.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run the config, and write the result and the plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, default=CONFIGS / "decode.json")
    parser.add_argument("--output", type=Path, default=RESULTS / "decode.json")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "decode.png")
    parser.add_argument("--memory-case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_case:
        print(measure_memory(json.loads(arguments.memory_case)))
        return
    config = json.loads(arguments.config.read_text(encoding="utf-8"))
    runs = run(config)
    save_result(arguments.output, config, runs=runs)
    plot(runs, arguments.plot)


if __name__ == "__main__":
    main()
