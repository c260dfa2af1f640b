"""A finished run in Python: what it measured, and what can be made of it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrquant.api.asked import named_model, shown_progress
from lrquant.api.shown import html_table
from lrquant.blocks.materialize import materialize
from lrquant.blocks.plan import Plan
from lrquant.blocks.variants import as_learned
from lrquant.blocks.workbench import make_workbench
from lrquant.config.config import optional_path
from lrquant.config.groups import Computing
from lrquant.errors import LRQuantError
from lrquant.files.whole import JsonObject
from lrquant.measures.evaluation.resolution import no_measures
from lrquant.measures.numbers import duration
from lrquant.model.loading import load_model
from lrquant.model.model import Model
from lrquant.model.reading import Processor
from lrquant.model.writing import Drawing, answer, require_writer
from lrquant.pipeline import Outcome
from lrquant.pipeline import run as carry_out
from lrquant.reports.figures import quality
from lrquant.runs.folder import RunFolder
from lrquant.runs.progress import Progress


class Run(Outcome, os.PathLike[str]):
    """A finished run: its `folder`, resolved settings (`config`) and `results`."""

    @classmethod
    def open(
        cls,
        folder: str | Path,
        model: str | Path | PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        processor: Processor | None = None,
    ) -> Run:
        """A finished run in `folder`; `model` is its full-precision model, if that has moved or was
        in memory."""
        opened = RunFolder.open(Path(folder))
        opened.require_finished()
        config = opened.config
        name, loaded = named_model(config.model if model is None else model, tokenizer, processor)
        loaded = loaded or load_model(name, optional_path(config.cache_dir))
        opened.require_same({"model": loaded.fingerprint()})
        plan, computing = Plan.of(config.quantizing), config.group(Computing)
        workbench = make_workbench(loaded, plan, computing, opened.path)
        return cls(opened, config, workbench, opened.results())

    def save(
        self, folder: str | Path, *, progress: Progress | bool | None = None, **settings: Any
    ) -> Path:
        """Write a checkpoint and return its folder.

        `settings` are `format`, `target`, `save_dtype` and `overwrite`; compressed-tensors is the
        format where neither of the first two is given.
        """
        return written(self.folder.path, folder, self._model, progress, **settings)

    def evaluate(self, *, progress: Progress | bool | None = None, **settings: Any) -> JsonObject:
        """Measure the run and return all its results; `settings` say what and how, as `ppl`,
        `agreement`, `tasks`, `compare` and `limit` do.

        Without a text or task the run's own are measured.
        """
        outcome = measure_finished(self.folder.path, self._model, progress, **settings)
        self.results = outcome.results
        return self.results

    def generate(
        self,
        prompt: str | Sequence[Mapping[str, str]],
        *,
        max_tokens: int = 256,
        temperature: float | None = None,
        seed: int = 0,
    ) -> str:
        """The answer to a prompt or to messages; without a chat template the text goes on.

        `temperature` 0 draws no tokens; without one, as the model's own settings say.
        """
        drawing = Drawing(max_tokens, temperature, seed)
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not turns or not all({"role", "content"} <= turn.keys() for turn in turns):
            raise LRQuantError("prompt: give a text, or messages with a role and content each")
        tokenizer = require_writer(self._module, self._model.tokenizer, self.config.net_name)
        return answer(self._module, tokenizer, turns, drawing)

    def load_model(self) -> PreTrainedModel:
        """The learned model as a transformers model in memory that computes as it was learned.

        Weights are dense and activations are quantised by hooks: for evaluation, not for serving.
        """
        return materialize(self.workbench, as_learned(self.workbench, self.folder))

    @property
    def _model(self) -> Model:
        return self.workbench.model

    @cached_property
    def _module(self) -> PreTrainedModel:
        return self.load_model()

    def __fspath__(self) -> str:
        return str(self.folder.path)

    def __repr__(self) -> str:
        figures = "; ".join(quality(self.results, self.records))
        about = f"{self.config.net_name} {self.config.schemes.name}"
        return f"<Run {about} in {self.folder.path}: {figures}>"

    def _repr_html_(self) -> str:
        title = f"{self.config.net_name} · {self.config.schemes.name}"
        return html_table(title, self._rows())

    def _rows(self) -> Iterator[tuple[str, str]]:
        yield "method", str(self.results.get("method", ""))
        yield "calibration", str(self.folder.identity["calibration"])
        yield from (("quality", text) for text in quality(self.results, self.records))
        yield "learning time", duration(sum(record.seconds for record in self.records))
        page = self.folder.path / "report.html"
        yield "run folder", str(self.folder.path)
        if page.is_file():
            yield "report", str(page)


def measure_finished(
    folder: Path, model: Model | None, progress: Progress | bool | None, **settings: Any
) -> Outcome:
    """A finished run, measured as `settings` say; its model, where that is not to be loaded."""
    asked = {**settings, "resume": str(folder), "epochs": 0}
    return carry_out(asked, model, progress=shown_progress(progress))


def written(
    run: Path,
    folder: str | Path,
    model: Model | None,
    progress: Progress | bool | None,
    **settings: Any,
) -> Path:
    """The checkpoint in `folder` that a finished run is written as, without measuring it again."""
    asked = {**settings, **no_measures(), "save_dir": str(folder)}
    measure_finished(run, model, progress, **asked)
    return Path(folder)
