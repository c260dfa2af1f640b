"""The folder of a stage that goes on where block learning ended: what it has learned, by block."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Protocol

from torch import Tensor

from lrquant.files.whole import JsonObject, as_bytes
from lrquant.runs.block_file import LearnedFile
from lrquant.runs.journal import Journal

OF_THE_RUN = ("tuned",)  # later stages that are a part of the run itself
MODEL = "model"  # their target


class Files(Protocol):
    """Files of tensors in the folder of one part of a run's model, by their path in it."""

    path: Path
    journal: Journal

    def inside(self, name: str) -> str:
        """The path of a file of this part in the whole folder."""

    def save(self, name: str, tensors: dict[str, Tensor], about: JsonObject) -> None:
        """Write a file, whole or not at all."""

    def load(self, name: str) -> LearnedFile:
        """Read a file that is as it was written."""


class StageFolder:
    """`STAGE/TARGET/NNNN.safetensors`: a stage's parameters of blocks, beside those of the run.

    `target` is what they are learned for, as a text by its name or its path.  It may be called as
    a folder is; no two share one folder.
    """

    def __init__(self, files: Files, stage: str, target: str) -> None:
        plain = re.sub(r"[^\w.-]+", "_", target, flags=re.ASCII).lstrip(".")[:100]
        own = "" if plain == target else "-" + hashlib.sha256(as_bytes(target)).hexdigest()[:8]
        self._files, self._folder = files, f"{stage}/{plain}{own}"

    def _name(self, index: int) -> str:
        return f"{self._folder}/{index:04d}.safetensors"

    def path(self, index: int) -> Path:
        """Where a block's parameters are."""
        return self._files.path / self._name(index)

    def save(self, index: int, parameters: dict[str, Tensor], about: JsonObject) -> None:
        """Keep a block's parameters, and `about` them; those of the run stay as they are."""
        self._files.save(self._name(index), parameters, about)

    def load(self, index: int) -> dict[str, Tensor]:
        """A block's parameters."""
        return self._files.load(self._name(index)).tensors

    def about(self, index: int) -> JsonObject | None:
        """What was kept beside a block's parameters; None if there are none."""
        return self._files.load(self._name(index)).about if self.path(index).is_file() else None

    def forget(self, kept: range = range(0)) -> None:
        """Remove the parameters that were learned earlier, but for those of `kept` blocks."""
        journal, folder = self._files.journal, self._files.inside(self._folder) + "/"
        names = [name for name in journal.ever_listed() if name.startswith(folder)]
        spared = {self._files.inside(self._name(index)) for index in kept}
        names = [name for name in names if name not in spared]
        journal.require_own(names)
        for name in names:
            if journal.owns(name):
                journal.remove(name)
