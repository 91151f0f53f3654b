"""`lm_eval` tasks from files, through the cache of the model that is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedModel

from optimum_mla import XEcoMLA
from optimum_mla.core.errors import InvalidValueError
from optimum_mla.measure.tasks import evaluate_tasks, task_manager
from optimum_mla.pipeline.benchmarking import cells
from optimum_mla.report.pages import markdown
from tests.report.test_pages import report

REFERENCE = Path(__file__).resolve().parents[2] / "benchmarks" / "reference_model"
TWO_BITS = {"bits": 2, "backend": "hqq", "residual_length": 0, "group_size": 64}
QUESTIONS = ("one two three four five six", "once upon a time there was a king")
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """The reference model at half of its cache, which it stores in two bits."""
    converted = XEcoMLA(kv_cache_ratio=0.5)(LlamaForCausalLM.from_pretrained(REFERENCE))
    converted.config.latent_cache = TWO_BITS
    return converted


def continuation(model: PreTrainedModel, tokenizer: Any, question: str) -> str:
    ids = tokenizer(question, return_tensors="pt").input_ids
    found = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    return tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def folder(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks: `go_on`, to write what the model writes from its quantized cache, and `choose`, by likelihood."""
    folder = tmp_path_factory.mktemp("tasks")
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    rows = [{"question": question, "answer": continuation(model, tokenizer, question)} for question in QUESTIONS]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    shared = (
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}}}\n"
        "test_split: test\n"
        'doc_to_text: "{{question}}"\n'
        'target_delimiter: ""\n'
    )
    (folder / "go_on.yaml").write_text(
        f"task: go_on\n{shared}output_type: generate_until\n"
        'doc_to_target: "{{answer}}"\n'
        f'generation_kwargs: {{until: ["@@@"], do_sample: false, max_gen_toks: {NEW_TOKENS}}}\n'
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    (folder / "choose.yaml").write_text(
        f"task: choose\n{shared}output_type: multiple_choice\n"
        'doc_to_choice: [" the", " qqqqqqqqqqqqqqqqqqqq"]\n'
        "doc_to_target: 0\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    return folder


def test_tasks_are_answered_through_the_models_own_cache(model: PreTrainedModel, folder: Path) -> None:
    names = ["go_on", "choose"]
    manager, tokenizer = task_manager(names, str(folder)), AutoTokenizer.from_pretrained(REFERENCE)
    found = {row[0]: row for row in evaluate_tasks(model, tokenizer, manager, names, 1, None)}
    assert {name: row[1:3] for name, row in found.items()} == {"go_on": ("exact_match", 1.0), "choose": ("acc", 1.0)}
    assert found["go_on"][3] == 0.0

    model.config.latent_cache = None
    try:
        tokenizer_side = [continuation(model, tokenizer, question) for question in QUESTIONS]
        (row,) = evaluate_tasks(model, tokenizer, manager, ["go_on"], 1, 1)
    finally:
        model.config.latent_cache = TWO_BITS
    answers = [json.loads(line)["answer"] for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert tokenizer_side[0] != answers[0]
    assert row[:3] == ("go_on", "exact_match", 0.0)


def test_a_cell_gives_the_rows_of_each_task(model: PreTrainedModel, folder: Path, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(REFERENCE).save_pretrained(tmp_path)
    model_there = {"location": str(tmp_path), "dtype": "auto", "device": "cpu", "hub": {}}
    request = {"tasks": ["go_on"], "tasks_path": str(folder), "batch": 1, "limit": 1}
    found = cells.answer("tasks", {"model": model_there, **request})
    assert json.loads(json.dumps(found["rows"])) == [["go_on", "exact_match", 1.0, None]]


def test_an_unknown_folder_is_refused() -> None:
    with pytest.raises(InvalidValueError, match=r"tasks_path: got 'nowhere', allowed: a folder of lm_eval task files"):
        task_manager(["go_on"], "nowhere")


def test_the_page_says_what_a_task_went_through() -> None:
    assert "Given answers are scored in one pass" in markdown([("run", report())])
