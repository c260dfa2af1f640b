"""The folder of one part of a model: its blocks, and what is kept of each."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lrquant.errors import LRQuantError
from lrquant.files.whole import JsonObject, json_object
from lrquant.runs.block_file import BlockRecord, LearnedFile
from lrquant.runs.chain import Chain
from lrquant.runs.journal import Journal
from lrquant.runs.mends import mend_of
from lrquant.runs.records import Records
from lrquant.runs.sameness import digest
from lrquant.runs.stages import MODEL, OF_THE_RUN, StageFolder

logger = logging.getLogger("lrquant")


class PartFolder:
    """`blocks/`, `blocks.jsonl`, `diagnostics/` and later stages' of one part of a run's model.

    A block is finished when its file exists and was learned after the block's before it as that is
    now: files are written under a temporary name, flushed, listed in the run's journal and renamed,
    so a kill at any point leaves whole files only.
    What is read must be as it was written, and what was not written here is never replaced.
    `part` is a folder inside the run's; the language part, of no name, has the run's own.
    """

    def __init__(self, path: Path, part: str = "") -> None:
        self.path = path / part
        self._part = part
        self.journal = Journal(path)
        self._chain = Chain(self.journal, lambda index: self.inside(self._block_name(index)))
        self._records = Records(
            *(self.journal, self.inside("blocks.jsonl"), self._chain),
            lambda index: self.load(self._block_name(index)).about,
            lambda text, damaged_too: self.write_text("blocks.jsonl", text, damaged_too),
        )

    @property
    def identity(self) -> JsonObject:
        """Model, scheme, method and data of the run."""
        return json_object(self.journal.read("run.json"))

    def _block_name(self, index: int) -> str:
        return f"blocks/{index:04d}.safetensors"

    def block_path(self, index: int) -> Path:
        """Where a block's learned parameters are."""
        return self.path / self._block_name(index)

    def _diagnostics_name(self, index: int) -> str:
        return f"diagnostics/{index:04d}.safetensors"

    def diagnostics_path(self, index: int) -> Path:
        """Where the report's figures of a block are, if they were taken."""
        return self.path / self._diagnostics_name(index)

    def finished_blocks(self) -> int:
        """How many blocks, from the first on, are finished: there, and one after the other."""
        return self._chain.finished()

    def require_as_written(self) -> None:
        """Refuse a finished block whose file is not as it was written."""
        for index in range(self.finished_blocks()):
            self._read(self._block_name(index))

    def save_block(self, parameters: dict[str, Tensor], record: BlockRecord) -> None:
        """Finish a block: its line in blocks.jsonl, then its parameters.

        The file holds nothing that a clock or the machine's state decides, so that two runs give
        the same bytes.
        """
        self._records.add(record)
        after = self._chain.hash_before(record.block)
        self.save(self._block_name(record.block), parameters, record.repeatable(), after)

    def hash_of(self, blocks: int) -> str:
        """The SHA-256 of the last of so many blocks, which names that of the one before it."""
        return self._chain.hash_before(blocks)

    def stage(self, name: str, target: str = MODEL) -> StageFolder:
        """What a stage after block learning has learned for a target, as a text or the model."""
        return StageFolder(self, name, target)

    def save_diagnostics(self, index: int, figures: JsonObject, tensors: dict[str, Tensor]) -> None:
        """Keep a block's figures for the report; before `save_block`, so that none is missing."""
        self.save(self._diagnostics_name(index), tensors, figures)

    def load_diagnostics(self, index: int) -> tuple[JsonObject, dict[str, Tensor]] | None:
        """A block's figures and tensors, None if they were not taken."""
        if not self.diagnostics_path(index).exists():
            return None
        file = self.load(self._diagnostics_name(index))
        return file.about, file.tensors

    def load_block(self, index: int) -> dict[str, Tensor]:
        """A finished block's learned parameters."""
        return self.load(self._block_name(index)).tensors

    def learned(self, index: int) -> dict[str, Tensor]:
        """What is kept of a block by all stages of the run."""
        later = [self.stage(name) for name in OF_THE_RUN]
        kept = self.load_block(index)
        for stage in later:
            kept |= stage.load(index) if stage.path(index).is_file() else {}
        return kept

    def records(self, damaged_too: bool = False) -> list[BlockRecord]:
        """The records of the finished blocks, in order; from the blocks where lines are missing.

        With `damaged_too`, from the blocks alone where blocks.jsonl is damaged.
        """
        return self._records.all(damaged_too)

    def require_block_of(self, identity: Mapping[str, object]) -> None:
        """Refuse a first block that is not of the run of `identity`."""
        self.load(self._block_name(0), digest(identity))

    def copy_blocks(self, other: PartFolder) -> None:
        """Take over another run's finished blocks and their records, as far as this lacks them.

        Nothing is taken over after blocks that were learned here and came out otherwise.
        """
        first, finished = self.finished_blocks(), other.finished_blocks()
        if first < finished and self._chain.hash_before(first) != other._chain.hash_before(first):
            logger.info(
                "%s: its blocks from %d on do not follow those of %s, and are not taken over",
                *(other.path, first, self.path),
            )
            finished = first
        if first < finished:
            self._records.write([*self.records(), *other.records(damaged_too=True)[first:]])
        for index in range(first, finished):
            if other.diagnostics_path(index).is_file():
                self._copy(other, self._diagnostics_name(index))
            self._copy(other, self._block_name(index))

    def _copy(self, other: PartFolder, name: str) -> None:
        content = other._read(name)
        try:
            self.journal.write(self.inside(name), content)
        except OSError as error:
            raise LRQuantError(
                f"run folder {self.path}: the blocks of {other.path} cannot be copied "
                f"({error.strerror}); free some space, or go on in place with --resume alone"
            ) from error

    def save(
        self, name: str, tensors: dict[str, Tensor], about: JsonObject, after: str = ""
    ) -> None:
        """Write a file of tensors of this run, whole or not at all."""
        name = self.inside(name)
        content = LearnedFile(digest(self.identity), name, about, tensors, after).content()
        try:
            self.journal.write(name, content)
        except OSError as error:
            raise LRQuantError(
                f"run folder {self.journal.folder}: {name} cannot be written ({error.strerror}); "
                "free some space and go on with --resume"
            ) from error

    def load(self, name: str, run: str | None = None) -> LearnedFile:
        """A file of tensors, of the run whose digest is `run`, this one if none is given."""
        name = self.inside(name)
        path = self.journal.folder / name
        mend = mend_of(name)
        file = LearnedFile.read(path, self.journal.read(name), mend)
        if file.run != (run or digest(self.identity)):
            raise LRQuantError(f"{path}: of a run with another model, scheme or data; {mend}")
        if file.name != name:
            raise LRQuantError(f"{path}: was written as {file.name}; {mend}")
        return file

    def write_text(self, name: str, text: str, damaged_too: bool = False) -> None:
        """Write a small file so that it is whole or absent; over a damaged one only if asked."""
        try:
            self.journal.write(self.inside(name), text, damaged_too)
        except OSError as error:
            raise self._unwritable(name, error) from error

    def _read(self, name: str) -> bytes:
        return self.journal.read(self.inside(name))

    def inside(self, name: str) -> str:
        """The path of a file of this part in the whole folder."""
        return f"{self._part}/{name}" if self._part else name

    def _unwritable(self, name: str, error: OSError) -> LRQuantError:
        return LRQuantError(
            f"run folder {self.path}: {name} cannot be written ({error.strerror}); free some space "
            "or use another --output_dir"
        )
