"""Measure how far the predictions of SmolLM2-135M-Instruct move, by the length of the context and on text read twice.

    python -m benchmarks.fidelity [--encyclopedia FILE]

Two numbers are given for each cache: the divergence KL(source, model) of the predictions, and the excess of the mean
negative log-likelihood of the text, both in nats per token. Windows of several lengths hold running text. Other windows
hold a passage twice, and only its second reading counts: the source then copies, and a model that finds words of long
ago less exactly does not. Every token is coded as soon as another one follows, apart from first ones where a
row says so: a stress test, because in use a prompt and the newest tokens are read exactly.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.coded_caches import coded_cache
from benchmarks.exact_model import codec_of
from benchmarks.result import CONFIGS, RESULTS, ROOT, save_result
from optimum_mla.cache.codec_layer import CodecCache, ExactTokens
from optimum_mla.calibrate.text import token_windows
from optimum_mla.models.codec import ModelCodec
from optimum_mla.stack import cache_argument

TOKENS_AT_ONCE = 2048


def predictions(model: Any, ids: Tensor, make_cache: Any, start: int) -> Tensor:
    """Return the logarithms of the next tokens' probabilities from place `start` on, [B, L - start, V].

    A cache that codes tokens only after they were read gets one token at a time.
    """
    cache = None if make_cache is None else make_cache()
    if isinstance(cache, CodecCache):
        given = {**cache_argument(model, cache), "use_cache": True}
        steps = [model(one, **given).logits.float().log_softmax(-1) for one in ids.split(1, dim=1)]
        return torch.cat(steps[start:], dim=1)
    given = {"use_cache": False} if cache is None else {**cache_argument(model, cache), "use_cache": True}
    return model(ids, **given, logits_to_keep=ids.shape[1] - start).logits.float().log_softmax(-1)


@torch.no_grad()
def compared(source: Any, others: list[tuple[Any, Any]], windows: Tensor, start: int) -> list[dict[str, float]]:
    """Return the divergence and the excess of each model and cache on windows [N, L], from place `start` on."""
    sums = torch.zeros(len(others), 2, dtype=torch.float64)
    for ids in windows.split(max(1, TOKENS_AT_ONCE // windows.shape[1])):
        expected, targets = predictions(source, ids, None, start), ids[:, start + 1 :, None]
        for number, (model, make_cache) in enumerate(others):
            off = expected - predictions(model, ids, make_cache, start)
            sums[number, 0] += (expected.exp() * off).sum(-1)[:, :-1].double().sum()
            sums[number, 1] += off[:, :-1].gather(2, targets).double().sum()
    means = sums / (len(windows) * (windows.shape[1] - start - 1))
    return [{"divergence": divergence, "excess": excess} for divergence, excess in means.tolist()]


def main() -> None:
    """Measure the rows of the config, print them and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, default=CONFIGS / "fidelity.json")
    parser.add_argument("--output", type=Path, default=RESULTS / "fidelity.json")
    parser.add_argument("--encyclopedia", type=Path, help="A UTF-8 text of an encyclopedia. Default: left out.")
    arguments = parser.parse_args()
    config = json.loads(arguments.config.read_text(encoding="utf-8"))
    codecs = json.loads((ROOT / config["codecs"]).read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(ROOT / config["model"])
    source = AutoModelForCausalLM.from_pretrained(ROOT / config["model"], dtype=torch.float32).eval()
    others: list[tuple[Any, Any]] = []
    for row in config["rows"]:
        if row["model"] == "unconverted":
            others.append((source, partial(coded_cache, source.config, row["cache"], row["sinks"])))
        else:
            codec = ModelCodec.load(codec_of(codecs, row["model"]))
            every = replace(codec, exact=ExactTokens(sinks=row["sinks"], recent=0, together=1))
            others.append((source, partial(every.make_cache, source)))
    texts = {"books": ROOT / config["books"]}
    if arguments.encyclopedia is not None:
        texts["encyclopedia"] = arguments.encyclopedia
    measured: list[dict[str, Any]] = []
    for text, path in texts.items():
        for kind in ("windows", "read_twice"):
            for tokens, count in config[kind]:
                ids = token_windows(tokenizer, str(path), tokens, count, text)
                start = 0
                if kind == "read_twice":
                    ids, start = ids.repeat(1, 2), tokens - 1  # The first token of the second reading is predicted too.
                found = compared(source, others, ids, start)
                measured.append({"text": text, "kind": kind, "tokens": tokens, "windows": count, "rows": found})
                print(
                    text, kind, tokens, *(f"{row['divergence']:.4f}/{row['excess']:.4f}" for row in found), flush=True
                )
    names = {"encyclopedia": arguments.encyclopedia.name} if arguments.encyclopedia else {}
    save_result(arguments.output, config, texts=names, measured=measured)


if __name__ == "__main__":
    main()
