"""`lm_eval` tasks, generated through a model's own cache.

Answers that are only scored go through the model in one pass with their question. A quantized cache stores tokens as
they pass and is read by later calls, so it makes no difference to them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from optimum_mla.errors import InvalidValueError, MissingDependencyError


def task_manager(tasks: list[str], include: str | None) -> Any:
    """`lm_eval`'s table of tasks.

    Args:
        tasks: Names, which must be in it.
        include: A folder of task files beside those of `lm_eval`, or None.

    Raises:
        MissingDependencyError: `lm_eval` is not installed.
        InvalidValueError: No such folder, or no such task.
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
            remedy = "lm_eval ls tasks shows all; --tasks-path adds a folder of your own."
            raise InvalidValueError("tasks", name, "tasks, groups or tags of lm_eval", remedy)
    return manager


def evaluate_tasks(
    model: PreTrainedModel, tokenizer: Any, manager: Any, tasks: list[str], batch_size: int, limit: int | None
) -> list[tuple[str, str, float, float | None]]:
    """Task, metric, value and standard error of every metric of every task.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        manager: From `task_manager`.
        tasks: Names of tasks.
        batch_size: Of requests.
        limit: At most so many documents of each task; None takes all.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    found = lm_eval.simple_evaluate(model=wrapped, tasks=tasks, task_manager=manager, limit=limit, log_samples=False)
    rows = []
    for task, metrics in found["results"].items():
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
