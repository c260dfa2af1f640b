"""Scores of tasks: what the harness says of a model in memory."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lrquant.config.groups import Sources
from lrquant.data.beginnings import beginning_by_itself, beginning_of
from lrquant.data.prompts import require_processor
from lrquant.errors import LRQuantError
from lrquant.measures.harness.settings import TaskSettings
from lrquant.measures.harness.task_list import Document, Tasks
from lrquant.measures.measure import WholeModel
from lrquant.measures.shares import counted
from lrquant.runs.results import Entry, Json, record

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM

logger = logging.getLogger("lrquant")
NEEDED = ("lm_eval", "accelerate")  # the harness does not ask for the second by itself
CPU_BATCH = 8  # a larger one gains nothing there, and trying costs five forwards


@dataclass(frozen=True)
class TaskScores:
    """One model's scores: the harness's whole output, and each item's value of each metric."""

    output: Mapping[str, Json]
    items: Mapping[str, Mapping[str, Sequence[object]]]

    @property
    def results(self) -> dict[str, Entry]:
        """Metrics by task and group, as the harness names them ("acc,none")."""
        return {name: record(value) for name, value in record(self.output["results"]).items()}

    def shots_of(self, task: str) -> int:
        """How many examples were in the prompt."""
        shots = record(self.output.get("n-shot")).get(task, 0)
        return shots if isinstance(shots, int) else 0

    def items_of(self, tasks: Sequence[str]) -> dict[str, int | str] | None:
        """How many items of these tasks were scored, of how many; None if it is not told."""
        samples = record(self.output.get("n-samples"))
        counts = [record(samples.get(task)) for task in tasks]
        if not all(counts):
            return None
        scored, whole = (
            sum(n for n in (count[name] for count in counts) if isinstance(n, int))
            for name in ("effective", "original")
        )
        return counted(scored, whole, "items")

    def to_json(self) -> str:
        """The harness's own JSON."""
        from lm_eval.utils import handle_non_serializable

        return json.dumps(self.output, indent=1, default=handle_non_serializable) + "\n"


def load_tasks(settings: TaskSettings, sources: Sources) -> Tasks:
    """The tasks that the settings name, with their sets; what can't be had is refused."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise LRQuantError(
            f"--tasks {settings.tasks}: {' and '.join(missing)} of lm-evaluation-harness not "
            "installed; pip install 'lrquant[eval]'"
        )
    from lrquant.measures.harness.building import build_tasks

    with quiet_harness():
        tasks = build_tasks(task_names(settings.tasks), settings, sources)
    for name, text in tasks.sets.items():
        if name not in tasks.parents:
            logger.info("task %s: %s", name, text)
    return tasks


def score_tasks(
    tasks: Tasks, model: WholeModel, settings: TaskSettings, sources: Sources
) -> TaskScores:
    """What the harness finds for a model in memory, whose requests all of a team answer."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from lrquant.measures.harness.sharing import SharedModel, finish

    if model.reader.tokenizer is None:
        raise LRQuantError("no tokenizer: zero-shot tasks need one")
    pictures = model.team.first(lambda: _with_pictures(tasks))
    with quiet_harness(), no_commit_of_this_folder():
        own = _wrapped(model, settings.task_batch_size, sources.bos, pictures)
        output = simple_evaluate(
            own if model.team.size == 1 else SharedModel(own, model.team),
            tasks=list(tasks.loaded),
            num_fewshot=settings.num_fewshot,
            limit=None if sources.limit < 0 else sources.limit,
            task_manager=TaskManager(include_defaults=False),  # they are loaded: none is looked up
        )
    finish(model.team)
    samples = output.pop("samples")
    return TaskScores(output, {task: _items(rows) for task, rows in samples.items()})


def answer_tasks(model: WholeModel, settings: TaskSettings, sources: Sources) -> None:
    """Another member's part of `score_tasks`."""
    from lrquant.measures.harness.sharing import serve

    pictures = model.team.first(lambda: False)
    with quiet_harness(bars=False):
        own = _wrapped(model, settings.task_batch_size, sources.bos, pictures)
        serve(own, model.team)


def _with_pictures(tasks: Tasks) -> bool:
    """Whether tasks show pictures; refuses some that do beside some that do not."""
    others = sorted(tasks.sets.keys() - tasks.with_pictures)
    if tasks.with_pictures and others:
        raise LRQuantError(
            f"--tasks: {', '.join(sorted(tasks.with_pictures))} show pictures and "
            f"{', '.join(others)} do not; the harness runs them apart, so give them in two commands"
        )
    return bool(tasks.with_pictures)


def _wrapped(model: WholeModel, size: str, bos: str, pictures: bool = False) -> HFLM:
    """The model as the harness runs it: with its processor where tasks show pictures."""
    import torch
    from lm_eval.models.hf_vlms import HFMultimodalLM
    from lm_eval.models.huggingface import HFLM

    module, reader = model.module, model.reader
    if not pictures:
        assert reader.tokenizer is not None
        model_type = reader.architecture.part(reader.skeleton.config).model_type
        beginning = beginning_of(reader.tokenizer, model_type, bos)
        return HFLM(
            pretrained=module,
            tokenizer=beginning_by_itself(reader.tokenizer, beginning),
            add_bos_token=bool(beginning.ids) if beginning.text else None,
            batch_size=CPU_BATCH if (size, module.device.type) == ("auto", "cpu") else size,
            softmax_dtype=torch.float32,
            trust_remote_code=False,
        )
    with tempfile.TemporaryDirectory() as folder:
        require_processor(reader).save_pretrained(folder)
        module.name_or_path = folder  # where the harness looks for a model's processor
        return HFMultimodalLM(
            pretrained=module, batch_size=1, convert_img_format=True, trust_remote_code=False
        )


def _items(samples: list[Document]) -> dict[str, list[object]]:
    """Values of each "metric,filter" in the order of the items."""
    values: dict[str, list[object]] = {}
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        for metric in sample["metrics"]:
            values.setdefault(f"{metric},{sample['filter']}", []).append(sample[metric])
    return values


def task_names(tasks: str) -> list[str]:
    """Names separated by commas, each once."""
    return list(dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip()))


@contextlib.contextmanager
def quiet_harness(bars: bool = True) -> Iterator[None]:
    """Its errors alone, and its progress bars and notes only on a terminal, if at all."""
    harness = logging.getLogger("lm_eval")
    level = harness.level
    harness.setLevel(logging.ERROR)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            if not (bars and sys.stderr.isatty()):
                nowhere = io.StringIO()
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            yield
    finally:
        harness.setLevel(level)


@contextlib.contextmanager
def no_commit_of_this_folder() -> Iterator[None]:
    """Keep the harness from asking git about the folder that the user is in.

    Its answer says nothing of the scores, and in most folders is git's complaint, on the screen.
    """
    from lm_eval import evaluator

    asked = evaluator.get_git_commit_hash
    evaluator.get_git_commit_hash = lambda: None
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = asked
