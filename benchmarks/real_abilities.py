"""Measure what perplexity does not see on SmolLM2-135M-Instruct: retrieval, lookup, copying, last words, agreement.

    python -m benchmarks.real_abilities [--answers]

The tasks are `lm_eval` tasks in `benchmarks/abilities` and need no network. Every prompt but its last tokens is read
into the cache in a first pass, and the rest in a second one, so that questions are answered from what the cache kept.
A measurement goes on with the runs that its result lacks; delete the result to measure everything again. A run of the
config may name fewer tasks than the others. `--answers` writes the unconverted model's greedy answers to the
instructions again, with which `agreement` compares.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache, PreTrainedModel

from benchmarks.coded_caches import coded_cache
from benchmarks.exact_model import codec_of
from benchmarks.real_quality import conversion_of
from benchmarks.result import CONFIGS, RESULTS, ROOT, earlier, save_result
from optimum_mla import load_codec
from optimum_mla.measure.tasks import metric_rows, task_manager
from optimum_mla.stack import cache_argument

TASKS = ROOT / "benchmarks" / "abilities"
ANSWERS = ROOT / "benchmarks" / "texts" / "answers.jsonl"
ANSWER_TOKENS = 32


class CachedReader(HFLM):
    """A model for `lm_eval` that reads each prompt into a cache first and answers from that cache.

    Prompts with a common beginning, such as several questions about one text, share its first pass.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        make_cache: Returns an empty cache.
        unread: Tokens at the end of a prompt that the second pass reads.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, make_cache: Callable[[], Cache], unread: int) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=1)
        self.make_cache, self.unread = make_cache, unread
        self.read_ids: list[int] = []
        self.read_cache: Cache | None = None

    def cache_of(self, ids: list[int]) -> Cache:
        """Return a cache of the first tokens of a prompt, which the caller may extend."""
        known = len(self.read_ids)
        if self.read_cache is None or known >= len(ids) or ids[:known] != self.read_ids:
            self.read_cache, self.read_ids = self.make_cache(), ids[: max(0, len(ids) - self.unread)]
            if self.read_ids:
                prompt = torch.tensor([self.read_ids])
                self.model(prompt, **cache_argument(self.model, self.read_cache), use_cache=True, logits_to_keep=1)
        return deepcopy(self.read_cache)

    @torch.no_grad()
    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the greedy answers to the prompts of the requests."""
        answers = []
        for prompt, options in (request.args for request in requests):
            ids = self.tok_encode(prompt)
            written = self.model.generate(
                torch.tensor([ids]),
                **cache_argument(self.model, self.cache_of(ids)),
                max_new_tokens=options["max_gen_toks"],
                do_sample=False,
                stop_strings=options["until"] or None,
                tokenizer=self.tokenizer,
            )
            answer = self.tokenizer.decode(written[0, len(ids) :], skip_special_tokens=True)
            for end in options["until"]:
                answer = answer.partition(end)[0]
            answers.append(answer)
        return answers

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        found = []
        for _, context, continuation in requests:
            cache = self.cache_of(context)
            rest = torch.tensor([(context + continuation)[len(self.read_ids) : -1]])
            logits = self.model(rest, **cache_argument(self.model, cache), use_cache=True).logits[0].float()
            logits, wanted = logits[-len(continuation) :].log_softmax(-1), torch.tensor(continuation)
            likely = logits.gather(1, wanted[:, None]).sum().item()
            found.append((likely, bool((logits.argmax(-1) == wanted).all())))
        return found


def run(config: dict[str, Any], line: dict[str, Any]) -> dict[str, Any]:
    """Return the metrics of one model with one cache, with their standard errors."""
    source = ROOT / config["model"]
    tokenizer = AutoTokenizer.from_pretrained(source)
    cache: Callable[[], Cache]
    if line["cache"] == "codes":
        codecs = json.loads((ROOT / config["codecs"]).read_text(encoding="utf-8"))
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        cache = load_codec(model, codec_of(codecs, line["model"])).make_cache  # type: ignore[attr-defined]
    elif line["model"] == "unconverted":
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        if line["cache"] == "16bit":
            cache = lambda: DynamicCache(config=model.config)  # noqa: E731
        else:
            cache = lambda: coded_cache(model.config, line["cache"], 0)  # noqa: E731
    else:
        quality = json.loads((ROOT / config["conversions"]).read_text(encoding="utf-8"))
        folder = conversion_of(quality, line["model"])
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        options: dict[str, Any] = {}
        if line["cache"] != "16bit":
            backend, _, bits = line["cache"].rpartition("-int")
            options = {"backend": backend, "bits": int(bits), "residual_length": 0}
        cache = lambda: model.make_cache(**options)  # noqa: E731
    reader = CachedReader(model, tokenizer, cache, config["unread"])
    started, metrics = time.perf_counter(), []
    asked = {**config, **line}  # a run may have fewer tasks than the others
    for tasks, chat in ((asked["tasks"], False), (asked["chat_tasks"], True)):
        if not tasks:
            continue
        manager = task_manager(tasks, str(TASKS))
        evaluated = simple_evaluate(reader, tasks=tasks, task_manager=manager, apply_chat_template=chat)
        metrics += [
            {
                "task": task,
                "metric": metric,
                "value": value,
                "stderr": error,
                "documents": len(evaluated["samples"][task]),
            }
            for task, metric, value, error in metric_rows(evaluated["results"])
        ]
        if chat is False:
            metrics += by_depth(evaluated["samples"])
    return {**line, "seconds": time.perf_counter() - started, "metrics": metrics}


def by_depth(samples: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the share of single needles found at each depth, over all lengths."""
    found: dict[float, list[float]] = {}
    for task, documents in samples.items():
        if task.startswith("needle_"):
            for document in documents:
                found.setdefault(document["doc"]["depth"], []).append(document["exact_match"])
    return [
        {
            "task": f"needle at {depth:.0%}",
            "metric": "exact_match",
            "value": sum(hits) / len(hits),
            "stderr": None,
            "documents": len(hits),
        }
        for depth, hits in sorted(found.items())
    ]


def write_answers(config: dict[str, Any]) -> None:
    """Write the greedy answers of the unconverted model to the instructions."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / config["model"])
    model = AutoModelForCausalLM.from_pretrained(ROOT / config["model"], dtype=torch.float32).eval()
    reader = CachedReader(model, tokenizer, lambda: DynamicCache(config=model.config), config["unread"])
    rows = []
    for text in (ROOT / "benchmarks" / "texts" / "instructions.txt").read_text(encoding="utf-8").splitlines():
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        ids = reader.tok_encode(prompt)
        written = model.generate(torch.tensor([ids]), max_new_tokens=ANSWER_TOKENS, do_sample=False)
        rows.append({"text": text, "answer": tokenizer.decode(written[0, len(ids) :], skip_special_tokens=True)})
    ANSWERS.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Measure every run of the config and write the result after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, default=CONFIGS / "real_abilities.json")
    parser.add_argument("--output", type=Path, default=RESULTS / "real_abilities.json")
    parser.add_argument("--answers", action="store_true", help="Write the source's answers again and stop.")
    arguments = parser.parse_args()
    config = json.loads(arguments.config.read_text(encoding="utf-8"))
    if arguments.answers:
        write_answers(config)
        return
    known, measured = earlier(arguments.output, config, "runs")
    runs = [run for run in known.get("runs", []) if any(line.items() <= run.items() for line in measured)]
    for line in config["runs"]:
        if not any(line.items() <= run.items() for run in runs):
            runs.append(run(config, line))
            for row in runs[-1]["metrics"]:
                print(*line.values(), *row.values(), flush=True)
        save_result(arguments.output, config, runs=runs)


if __name__ == "__main__":
    main()
