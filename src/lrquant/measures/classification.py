"""Image classifiers: accuracy on a folder with one subfolder a class, and agreement of top-1."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from lrquant.config.settings import setting
from lrquant.measures.measure import Metric, ModuleMeasure, Scored, WholeModel
from lrquant.measures.shares import share
from lrquant.runs.results import Entry, Json, Results

if TYPE_CHECKING:
    from torch import Tensor

    from lrquant.config.groups import Sources
    from lrquant.data.prompts import Reader
    from lrquant.measures.scoring.classes import LabelledPictures
    from lrquant.runs.progress import Progress


@dataclass(frozen=True)
class ClassificationSettings:
    """The folder of pictures."""

    classify: str | None = setting(
        None, "accuracy of an image classifier on a folder of pictures, one subfolder a class"
    )


@dataclass(frozen=True)
class Classes:
    """The class that a model finds for each picture, (pictures,) int64, and the right ones."""

    chosen: Tensor
    labels: Tensor

    def scores(self, reference: Classes | None) -> dict[str, float]:
        """Share of right classes with its standard error, and of those that a reference finds."""
        told = share((self.chosen == self.labels).tolist()).named("accuracy")
        if reference is not None:
            told["same_top"] = float((self.chosen == reference.chosen).double().mean())
        return told


class Classification(ModuleMeasure[ClassificationSettings, "LabelledPictures", Classes]):
    """A run's classes are held against those of its full precision."""

    name = "classification"
    settings = ClassificationSettings
    asked_by = ("classify",)
    order = 40
    shared = True
    against_full_precision = True
    heading = "pictures"
    column = "share right"
    unnamed = "classes"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "accuracy": Metric("accuracy"),
        "same_top": Metric("same class as full precision", spread=False),
    }

    def read(
        self, settings: ClassificationSettings, sources: Sources, reader: Reader
    ) -> Mapping[str, LabelledPictures]:
        from lrquant.measures.scoring.classes import LabelledPictures

        if settings.classify is None:
            return {}
        return {"": LabelledPictures(Path(settings.classify), reader, sources.limit)}

    def described(self, asked: LabelledPictures) -> str:
        return asked.description

    def about(self, asked: LabelledPictures) -> Entry:
        return asked.about

    def score(
        self,
        name: str,
        asked: LabelledPictures,
        model: WholeModel,
        settings: ClassificationSettings,
        sources: Sources,
        progress: Progress,
    ) -> Classes:
        from lrquant.measures.scoring.classes import predictions

        return Classes(predictions(asked, model, progress), asked.labels)

    def assist(self, model: WholeModel, settings: ClassificationSettings, sources: Sources) -> None:
        from lrquant.measures.scoring.classes import predictions
        from lrquant.runs.progress import Progress

        predictions(None, model, Progress())

    def as_json(self, scores: Classes) -> Json:
        return scores.scores(None)

    def entries(
        self, scored: Scored[LabelledPictures, Classes], settings: ClassificationSettings
    ) -> Results:
        several = len(scored.scores) > 1
        full = scored.scores.get("full_precision") if several else None
        told = {variant: classes.scores(full) for variant, classes in scored.scores.items()}
        return {self.name: {**scored.about, **told}}

    def log_lines(self, scored: Scored[LabelledPictures, Classes], variant: str) -> Iterable[str]:
        right = scored.scores[variant].scores(None)["accuracy"]
        yield f"{variant}: {right:.4f} of the classes are right, {scored.asked.description}"


MEASURE = Classification()
