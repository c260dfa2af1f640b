"""A run before it starts, and a check of it: what it refuses, and what it says else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from lrquant.blocks.generation import OwnText
from lrquant.blocks.plan import Plan
from lrquant.blocks.workbench import Workbench, make_workbench
from lrquant.config.config import Config, optional_path
from lrquant.config.groups import Computing
from lrquant.data.own import OwnData
from lrquant.data.samples import Samples
from lrquant.data.texts import TextSplit
from lrquant.formats.format import Format
from lrquant.ingredients.base.statistics import ChannelStatistics
from lrquant.measures.evaluation.evaluation import Evaluation, Reading
from lrquant.model.loading import load_model
from lrquant.model.model import Model
from lrquant.runs.folder import RunFolder
from lrquant.team.team import Team

State = Literal["ok", "warning"]


@dataclass(frozen=True)
class Said:
    """What a check says where it refuses nothing; `logged` is what a run's log has of it.

    `what` names the finding, where that is not what the check is called.
    """

    text: str
    state: State = "ok"
    logged: str = ""
    what: str = ""


@dataclass(frozen=True)
class Check:
    """One requirement by name; `more` is to be said beside its refusal where all are collected."""

    what: str
    of: Callable[[], Iterable[Said]]
    more: str = ""


@dataclass(frozen=True)
class Material:
    """What the first of several processes has read, for the others."""

    calibration: Samples | None
    tuning: Samples | None
    statistics: ChannelStatistics | None
    texts: Mapping[str, Samples]
    compiled: bool


@dataclass
class Prospect:
    """A run before it starts: its settings, and what the checks have opened and read for it.

    With `apart`, each set to measure on is read by itself, so that all that are missing are told;
    else all of them together, to measure on.
    """

    config: Config
    measure_only: bool
    plan: Plan
    model: Model | None = None
    own_data: OwnData | None = None
    apart: bool = False
    form: Format | None = None
    workbench: Workbench | None = None
    calibration: Samples | None = None
    tuning: Samples | None = None
    statistics: ChannelStatistics | None = None
    evaluation: Evaluation | None = None
    reading: Reading | None = None
    writer: OwnText | None = None
    texts: dict[str, Samples] = field(default_factory=dict)
    passed: set[str] = field(default_factory=set)

    @property
    def material(self) -> Material:
        """What the checks of a run have read."""
        assert self.workbench is not None and self.reading is not None
        texts, compiled = self.reading.texts, self.workbench.compiled
        return Material(self.calibration, self.tuning, self.statistics, texts, compiled)

    @property
    def learned_texts(self) -> frozenset[TextSplit]:
        """The splits that are learned from, or that the run which is measured was learned from."""
        if self.measure_only:
            kept = RunFolder.open(Path(self.config.resume or "")).identity.get("texts", [])
            return frozenset((origin, split) for origin, split in kept)
        learned = [each.texts for each in (self.calibration, self.tuning) if each is not None]
        return frozenset().union(*learned)

    def take_over(self, material: Material, team: Team) -> None:
        """Open the model, and take from another process what it has read."""
        config = self.config
        model = self.model or load_model(config.model, optional_path(config.cache_dir))
        computing, scratch = config.group(Computing), Path(config.output_dir)
        bench = make_workbench(model, self.plan, computing, scratch)
        self.model, self.workbench = model, replace(bench, compiled=material.compiled)
        self.calibration, self.tuning = material.calibration, material.tuning
        self.statistics = material.statistics
        self.evaluation = Evaluation(config, team=team)
        self.reading = Reading(material.texts, [])
