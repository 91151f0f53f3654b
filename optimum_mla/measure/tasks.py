"""Evaluation of `lm_eval` tasks, whose answers are generated through a model's own cache.

Answers that are only scored go through the model in one pass with their question. A quantized cache makes no difference
to them, because only later calls read the quantized tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from optimum_mla.core.errors import InvalidValueError, MissingDependencyError


def task_manager(tasks: list[str], include: str | None) -> Any:
    """Return the task manager of `lm_eval`.

    Args:
        tasks: Names of tasks that it must know.
        include: A folder with further task files, or None.

    Raises:
        MissingDependencyError: `lm_eval` is not installed.
        InvalidValueError: There is no such folder or no such task.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingDependencyError("lm-eval", "eval", "run lm_eval tasks") from error
    if include is not None and not Path(include).is_dir():
        raise InvalidValueError("tasks_path", include, "a folder of lm_eval task files")
    manager = TaskManager(include_path=include)
    for name in tasks:
        if name not in manager.all_tasks:
            remedy = "The command lm_eval ls tasks lists them; --tasks-path adds a folder of your own."
            raise InvalidValueError("tasks", name, "tasks, groups or tags of lm_eval", remedy)
    return manager


def evaluate_tasks(
    model: PreTrainedModel, tokenizer: Any, manager: Any, tasks: list[str], batch_size: int, limit: int | None
) -> list[tuple[str, str, float, float | None]]:
    """Return the task, metric, value and standard error for every metric of every task.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        manager: From `task_manager`.
        tasks: Names of tasks.
        batch_size: Number of requests in a batch.
        limit: Largest number of documents per task; None takes all.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    found = lm_eval.simple_evaluate(model=wrapped, tasks=tasks, task_manager=manager, limit=limit, log_samples=False)
    return metric_rows(found["results"])


def metric_rows(results: dict[str, dict[str, Any]]) -> list[tuple[str, str, float, float | None]]:
    """Return the task, metric, value and standard error for every metric in the `results` of an evaluation."""
    rows = []
    for task, metrics in results.items():
        for name, value in metrics.items():
            metric, _, filter_ = name.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, int | float) or isinstance(value, bool):
                continue
            if metric in ("alias", "sample_len"):
                continue
            error = metrics.get(f"{metric}_stderr,{filter_}")
            label = metric if filter_ in ("", "none") else f"{metric} ({filter_})"
            rows.append((task, label, float(value), float(error) if isinstance(error, int | float) else None))
    return rows
