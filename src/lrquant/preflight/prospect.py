"""A run before it starts, and a check of it: what it refuses, and what it says else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from lrquant.blocks.generation import OwnText
from lrquant.blocks.plan import Plan
from lrquant.blocks.workbench import Workbench
from lrquant.config.config import Config
from lrquant.data.own import OwnData
from lrquant.data.samples import Samples
from lrquant.formats.format import Format
from lrquant.ingredients.base.statistics import ChannelStatistics
from lrquant.measures.evaluation.evaluation import Evaluation, Reading
from lrquant.model.model import Model

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
