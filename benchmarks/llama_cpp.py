"""Run SmolLM2-135M-Instruct, converted at half of its cache, in llama.cpp: perplexity, cache bytes and logits.

    python -m benchmarks.llama_cpp [--config ...] [--output ...]

The model is converted for llama.cpp, written as a GGUF file in each type of the config, and run with each type of cache
beside the converted model in Transformers. Perplexity is that of the books of the experiment on quality. Logits are
compared with those of the converted model in float64, from which its own in float32 differ too.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.llama import FURTHER_TYPES, LlamaModel, quantize
from benchmarks.real_quality import ANSWER_TOKENS, answers, converted
from benchmarks.result import CONFIGS, RESULTS, ROOT, save_result


def run(config: dict[str, Any]) -> dict[str, Any]:
    """Return what was measured of the source, of the converted model, and of each file with each cache."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from optimum_mla.calibrate.text import token_windows
    from optimum_mla.measure.greedy import greedy
    from optimum_mla.measure.quality import perplexity
    from optimum_mla.measure.sizes import layer_numbers
    from optimum_mla.pipeline import export

    quality = json.loads((ROOT / config["quality"]).read_text(encoding="utf-8"))
    folder = converted(quality["model"], config["name"], config["options"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    source, model = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (ROOT / quality["model"], folder)
    )
    sizes = quality["tokens_per_window"], quality["windows"]
    windows = token_windows(tokenizer, str(ROOT / quality["books"]), *sizes, "books")
    prompt = tokenizer(config["prompt"]).input_ids
    with torch.no_grad():
        rounded = model(torch.tensor([prompt])).logits[0].numpy()
        logits = model.double()(torch.tensor([prompt])).logits[0].numpy()
        model.float()
        tokens = greedy(model, torch.tensor([prompt]), config["new_tokens"]).sequences
    expected = tokens[0, len(prompt) :].tolist()
    ((_, answer),) = answers(model, tokenizer, [config["message"]])
    found: dict[str, Any] = {
        "source": {
            "perplexity": perplexity(source, windows),
            "cache_bytes_per_token": 2 * sum(layer_numbers(source.config) or []),
        },
        "converted": {
            "perplexity": perplexity(model, windows),
            "cache_bytes_per_token": 2 * model.geometry.cache_numbers,
            "largest_logit_difference": float(np.abs(rounded - logits).max()),
            "answer": answer["content"],
        },
        "runs": [],
    }
    with tempfile.TemporaryDirectory() as scratch:
        for file_type, caches in config["runs"].items():
            output = Path(scratch) / file_type
            written = "f16" if file_type in FURTHER_TYPES else file_type
            export(str(folder), output, "gguf", dtype="float32", gguf_type=written)
            (path,) = output.glob("*.gguf")
            if file_type != written:
                quantize(path, output / f"{file_type}.gguf", file_type)
                path = output / f"{file_type}.gguf"
            for cache in caches:
                with LlamaModel(path, cache=cache) as llama:
                    theirs = llama.logits(prompt)
                    losses = [_loss(np.asarray(llama.logits(ids)), ids) for ids in windows.tolist()]
                    found["runs"].append(
                        {
                            "file": file_type,
                            "file_bytes": path.stat().st_size,
                            "cache": cache,
                            "cache_bytes_per_token": llama.cache_bytes / llama.cells,
                            "perplexity": math.exp(sum(losses) / (len(losses) * (windows.shape[1] - 1))),
                            "largest_logit_difference": float(np.abs(theirs - logits).max()),
                            "same_greedy_tokens": _alike(llama.greedy(prompt, len(expected)), expected),
                            "same_answer": llama.answer(config["message"], ANSWER_TOKENS) == answer["content"],
                            "same_prompt_tokens": llama.tokens(config["prompt"]) == prompt,
                        }
                    )
                print(found["runs"][-1], flush=True)
    return found


def _loss(logits: Any, ids: list[int]) -> float:
    """Return the sum of the negative log-likelihoods of all tokens of a window but the first."""
    import torch

    return float(
        torch.nn.functional.cross_entropy(torch.from_numpy(logits[:-1]), torch.tensor(ids[1:]), reduction="sum")
    )


def _alike(found: list[int], expected: list[int]) -> int:
    """Return how many tokens are the same before the first difference."""
    return next((n for n, (one, other) in enumerate(zip(found, expected, strict=True)) if one != other), len(expected))


def main() -> None:
    """Run the config and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, default=CONFIGS / "llama_cpp.json")
    parser.add_argument("--output", type=Path, default=RESULTS / "llama_cpp.json")
    arguments = parser.parse_args()
    config = json.loads(arguments.config.read_text(encoding="utf-8"))
    save_result(arguments.output, config, **run(config))


if __name__ == "__main__":
    main()
