"""Zero-shot tasks through lm-evaluation-harness (the extra `lrquant[eval]`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from lrquant.config import Config
from lrquant.errors import LRQuantError
from lrquant.evaluation.perplexity import PreparedBlock
from lrquant.materialize import materialize
from lrquant.workbench import Workbench

NEEDED = ("lm_eval", "accelerate")  # the harness does not ask for the second by itself


def check_tasks(tasks: str) -> None:
    """Refuse tasks that can't be run, before any hour is spent."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise LRQuantError(
            f"--tasks {tasks}: {' and '.join(missing)} of lm-evaluation-harness not installed; "
            "pip install 'lrquant[eval]'"
        )
    from lm_eval.tasks import TaskManager

    unknown = set(_names(tasks)) - set(TaskManager().all_tasks)
    if unknown:
        raise LRQuantError(f"--tasks: the harness has no task {', '.join(sorted(unknown))}")


def evaluate_tasks(
    workbench: Workbench, prepare: Callable[[int], PreparedBlock], config: Config
) -> dict[str, Any]:
    """The harness's own results, by task, of the model whose blocks `prepare` gives."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    module = materialize(workbench, prepare)
    wrapped = HFLM(pretrained=module, tokenizer=workbench.model.tokenizer, batch_size=1)
    results = simple_evaluate(
        wrapped,
        tasks=_names(config.tasks),
        num_fewshot=config.num_fewshot,
        limit=None if config.limit < 0 else config.limit,
    )
    return results["results"]


def _names(tasks: str) -> list[str]:
    return [name.strip() for name in tasks.split(",") if name.strip()]
