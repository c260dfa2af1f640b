"""Labelled pictures as a classifier's inputs, and the classes that it finds for them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lrquant.data.conversations import picture_files
from lrquant.data.feeds import Feed
from lrquant.data.prompts import Reader, pixel_inputs, require_processor
from lrquant.errors import LRQuantError
from lrquant.measures.measure import WholeModel
from lrquant.measures.scoring.inputs import feed_of, joined, own_batches
from lrquant.measures.shares import counted
from lrquant.runs.progress import Progress
from lrquant.runs.results import Entry

BATCH = 16  # pictures that are classified at once


class LabelledPictures:
    """Pictures with their classes, as a classifier's inputs; at most `limit` of them, spread."""

    def __init__(self, folder: Path, reader: Reader, limit: int = -1) -> None:
        if not reader.architecture.reads_pixels:
            raise LRQuantError(f"--classify {folder}: model {reader.name} is no image classifier")
        require_processor(reader)
        if not folder.is_dir():
            raise LRQuantError(f"--classify {folder}: no such folder; give one subfolder a class")
        files, skipped = picture_files(folder)
        whole = len(files)
        if 0 < limit < whole:
            files = [files[i * len(files) // limit] for i in range(limit)]
        classes = _classes(reader)
        self.labels = torch.tensor([_label(file, folder, classes) for file in files])
        self.feed = Feed([pixel_inputs(reader, file) for file in files])
        left_out = f", {len(skipped)} could not be opened" if skipped else ""
        of = f"{len(files)} of {whole}" if len(files) < whole else f"{whole}"
        self.description = f"{folder.name}, {of} pictures{left_out}"
        items = counted(len(files), whole, "pictures")
        sha256 = self.feed.sha256()
        self.about: Entry = {"text": self.description, "sha256": sha256, "items": items}


def _classes(reader: Reader) -> dict[str, int]:
    """Index of each class, by its names and by its number."""
    classes: dict[str, int] = {}
    for index, names in (reader.skeleton.config.id2label or {}).items():
        for name in (str(index), str(names), *str(names).split(",")):
            classes.setdefault(name.strip().lower(), int(index))
    return classes


def _label(file: Path, folder: Path, classes: dict[str, int]) -> int:
    name = file.relative_to(folder).parts[0].lower()
    if name not in classes or file.parent == folder:
        raise LRQuantError(
            f"--classify {folder}: {file.relative_to(folder)} is in no folder named as one of the "
            f"model's {len(set(classes.values()))} classes or their numbers (such as "
            f"{next(iter(classes))})"
        )
    return classes[name]


@torch.no_grad()
def predictions(pictures: LabelledPictures | None, model: WholeModel, progress: Progress) -> Tensor:
    """The class with the largest logit of each picture, (pictures,) int64 on the CPU.

    The first of a team has the pictures, and each member its share of the batches.
    """
    module, team = model.module, model.team
    feed = team.first(partial(feed_of, pictures))
    chosen: dict[int, Tensor] = {}
    with progress.measuring(f"classes {model.variant}", len(feed), "pictures") as told:
        for rows in own_batches(feed, BATCH, team):
            inputs = {name: value.to(module.device) for name, value in feed.collate(rows).items()}
            chosen[rows.start] = module(**inputs).logits.argmax(-1).cpu()
            told(rows.stop - 1)
    batches = joined(team, chosen)
    return torch.cat([batches[start] for start in sorted(batches)])
