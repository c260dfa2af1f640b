"""Visual question answering: generated answers against the right ones of a .jsonl."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from lrquant.config.settings import setting
from lrquant.measures.measure import Metric, ModuleMeasure, Scored, WholeModel
from lrquant.measures.numbers import share as written
from lrquant.measures.rows import RunResults, Tile, named
from lrquant.measures.shares import Share, share
from lrquant.runs.results import Entry, Json, figure, record

if TYPE_CHECKING:
    from lrquant.config.groups import Sources
    from lrquant.data.prompts import Reader
    from lrquant.measures.scoring.answers import Questions
    from lrquant.runs.progress import Progress


@dataclass(frozen=True)
class AnsweringSettings:
    """The files of questions."""

    vqa: tuple[str, ...] = setting(
        (), "visual question answering: .jsonl files of conversations with answers"
    )


@dataclass(frozen=True)
class AnswerScores:
    """Shares of right answers: of all, of each kind where a set has several, by the VQA rule."""

    exact_match: Share
    by_kind: Mapping[str, Share]
    vqa_accuracy: Share


class Answering(ModuleMeasure[AnsweringSettings, "Questions", AnswerScores]):
    """Answers are generated greedily."""

    name = "vqa"
    settings = AnsweringSettings
    asked_by = ("vqa",)
    order = 30
    shared = True
    heading = "pictures"
    column = "share right"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "exact_match": Metric("exact match"),
        "exact_match_yes_no": Metric("exact match of yes or no"),
        "exact_match_number": Metric("exact match of numbers"),
        "exact_match_other": Metric("exact match of other answers"),
        "vqa_accuracy": Metric("VQA rule"),
    }

    def set_by_set(self, settings: AnsweringSettings) -> Iterable[AnsweringSettings]:
        return [dataclasses.replace(settings, vqa=(name,)) for name in settings.vqa]

    def read(
        self, settings: AnsweringSettings, sources: Sources, reader: Reader
    ) -> Mapping[str, Questions]:
        from lrquant.measures.scoring.answers import Questions

        return {name: Questions(Path(name), reader, sources.limit) for name in settings.vqa}

    def described(self, asked: Questions) -> str:
        return asked.description

    def about(self, asked: Questions) -> Entry:
        return asked.about

    def score(
        self,
        name: str,
        asked: Questions,
        model: WholeModel,
        settings: AnsweringSettings,
        sources: Sources,
        progress: Progress,
    ) -> AnswerScores:
        from lrquant.measures.scoring.answers import answer_kind, answers, exact_match, vqa_accuracy

        right = [item.answers for item in asked.items]
        pairs = list(zip(answers(name, asked, model, progress), right, strict=True))
        matches = [exact_match(*pair) for pair in pairs]
        kinds = [answer_kind(each) for each in right]
        by_kind = {
            kind: share([match for match, own in zip(matches, kinds, strict=True) if own == kind])
            for kind in sorted(set(kinds))
        }
        by_rule = share([vqa_accuracy(*pair) for pair in pairs])
        return AnswerScores(share(matches), by_kind if len(by_kind) > 1 else {}, by_rule)

    def assist(self, model: WholeModel, settings: AnsweringSettings, sources: Sources) -> None:
        from lrquant.measures.scoring.answers import answers
        from lrquant.runs.progress import Progress

        answers("", None, model, Progress())

    def as_json(self, scores: AnswerScores) -> Json:
        told = scores.exact_match.named("exact_match")
        for kind, accuracy in scores.by_kind.items():
            told |= accuracy.named(f"exact_match_{kind}")
        return told | scores.vqa_accuracy.named("vqa_accuracy")

    def log_lines(self, scored: Scored[Questions, AnswerScores], variant: str) -> Iterable[str]:
        scores = scored.scores[variant]
        yield (
            f"{scored.name}, {variant.replace('_', ' ')}: {scores.exact_match.mean:.4f} of the "
            f"answers to {len(scored.asked.items)} questions are right, "
            f"{scores.vqa_accuracy.mean:.4f} by the VQA rule"
        )

    def tiles(self, run: RunResults) -> list[Tile]:
        tiles = []
        for name, about, variants in named(run.results, self.name)[:1]:
            if "quantized" in variants:
                right = written(figure(record(variants["quantized"]).get("exact_match")))
                tiles.append(Tile(f"right answers, {Path(name).name}{about}", right, ""))
        return tiles


MEASURE = Answering()
