"""The run folder: what a run is, one file a finished block, and resuming it."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

from torch import Tensor

from lrquant.config.config import Config
from lrquant.errors import LRQuantError
from lrquant.files.whole import LogFile, as_bytes, is_regular, json_object, read_json
from lrquant.runs.block_file import BlockRecord, LearnedFile
from lrquant.runs.chain import Chain
from lrquant.runs.claims import held, require_claimable
from lrquant.runs.journal import JOURNAL, Journal
from lrquant.runs.mends import AGAIN, mend_of
from lrquant.runs.results import merge_results
from lrquant.runs.sameness import difference, digest

__all__ = ["BlockRecord", "RunFolder"]
logger = logging.getLogger("lrquant")
FORMAT = 3


class RunFolder:
    """`config.yaml`, `run.json` (what must match to resume), `blocks/`, `blocks.jsonl`, results.

    `diagnostics/`, where a report is asked for, has what a block looked like when it was learned.

    A block is finished when its file exists and was learned after the block's before it as that is
    now: files are written under a temporary name, flushed, listed in the folder's journal and
    renamed, so a kill at any point leaves whole files only.
    What is read must be as it was written, and what was not written here is never replaced.
    `part` is a folder inside, whose files are those of one part of the model.
    """

    def __init__(self, path: Path, part: str = "") -> None:
        self.path = path / part
        self._part = part
        self.journal = Journal(path)
        self._chain = Chain(self.journal, lambda index: self._inside(self._block_name(index)))

    @classmethod
    def create(cls, path: Path, config: Config, identity: dict[str, Any]) -> RunFolder:
        """Start a new run; an old run in the same folder is replaced."""
        folder = cls(path)
        require_claimable(path, "run")
        folder._begin("run")
        folder.write_text("config.yaml", config.to_yaml())
        folder._write_identity(identity)
        return folder

    @classmethod
    def start(
        cls, path: Path, config: Config, identity: dict[str, Any], resume: Path | None
    ) -> RunFolder:
        """A new run, or the run in `resume` to go on with; elsewhere than in `path`, a copy of it.

        `identity` must equal that of the resumed run.  A run in `path` is replaced only if the
        settings say `overwrite`; a copy that was cut off is completed.
        """
        folder = cls(path)
        if resume is None:
            folder.require_replaceable(config)
            return cls.create(path, config, identity)
        source = cls(resume)
        if resume.resolve() == path.resolve():
            source._go_on(config, identity)
            require_claimable(path, "run")
            return source
        with held(resume) if os.access(resume, os.W_OK) else nullcontext():
            source._go_on(config, identity)
            if config.overwrite or not folder._is_run_of(identity):
                folder.require_replaceable(config)
                cls.create(path, config, identity)
            folder.copy_blocks(source)
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run."""
        folder = cls(path)
        if not (path / "run.json").is_file():
            mend = f"; restore it, or {AGAIN}" if folder._all_finished_blocks() else ""
            raise LRQuantError(f"run folder {path}: no run here (run.json is missing){mend}")
        folder.require_format()
        if folder.journal.holds is None:
            raise LRQuantError(
                f"run folder {path}: {JOURNAL} is missing, by which the rest is checked; restore "
                "it, or learn again in another --output_dir"
            )
        if "run.json" not in folder.journal.listed():
            raise LRQuantError(
                f"run folder {path}: no run here: a start was cut off; give that command again"
            )
        folder._read("run.json")
        folder._read("config.yaml")
        return folder

    def require_format(self) -> None:
        """Refuse a run of another version, if one is here."""
        if not (self.path / "run.json").is_file():
            return
        version = read_json(self.path / "run.json").get("format")
        if version != FORMAT:
            raise LRQuantError(
                f"run folder {self.path}: format {version!r}, this version reads format {FORMAT}; "
                "learn again in another --output_dir"
            )

    def require_replaceable(self, config: Config) -> None:
        """Refuse to replace learned blocks without `overwrite`, or what is not of a run at all."""
        require_claimable(self.path, "run")
        learned = self._all_finished_blocks()
        if learned and not config.overwrite:
            raise LRQuantError(
                f"run folder {self.path}: holds a run of {learned} learned blocks; go on with "
                "--resume, replace it with --overwrite, or use another --output_dir"
            )

    def begin_results(self) -> None:
        """Make this a folder of results without a run, if it is none yet."""
        require_claimable(self.path, "results")
        if self.journal.holds is None:
            self._begin("results")

    def _begin(self, holds: str) -> None:
        """Give up what the folder held, and remove it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.journal.begin(holds)
            self.journal.remove_earlier()
        except OSError as error:
            raise self._unwritable(JOURNAL, error) from error

    def _go_on(self, config: Config, identity: dict[str, Any]) -> None:
        """Require that this is the run of `identity`; small files that are missing come anew."""
        if self._all_finished_blocks() and not (self.path / "run.json").exists():
            first = self if self.finished_blocks() else self.tower
            first._load(first._block_name(0), digest(identity))
            self._write_identity(identity)
        listed = "run.json" in self.journal.listed()
        if listed and not (self.path / "config.yaml").exists():
            self.require_same(identity)
            self.write_text("config.yaml", config.to_yaml())
        RunFolder.open(self.path).require_same(identity)

    def _is_run_of(self, identity: dict[str, Any]) -> bool:
        try:
            RunFolder.open(self.path).require_same(identity)
        except LRQuantError:
            return False
        return True

    def _write_identity(self, identity: dict[str, Any]) -> None:
        self.write_text("run.json", json.dumps({"format": FORMAT, **identity}, indent=1) + "\n")

    @property
    def identity(self) -> dict[str, Any]:
        """Model, scheme, method and data of the run."""
        return json_object(self.journal.read("run.json"))

    @property
    def config(self) -> Config:
        """The resolved settings that the run was started with."""
        self.journal.read("config.yaml")
        return Config.from_yaml(self.journal.folder / "config.yaml")

    def require_same(self, identity: dict[str, Any]) -> None:
        """Refuse to go on with a run of another model, scheme, method or data."""
        other = difference(self.identity, identity)
        if other is not None:
            raise LRQuantError(
                f"run folder {self.path}: {other}; use the same settings or another --output_dir"
            )

    def _block_name(self, index: int) -> str:
        return f"blocks/{index:04d}.safetensors"

    def block_path(self, index: int) -> Path:
        """Where a block's learned parameters are."""
        return self.path / self._block_name(index)

    def _adapted_folder(self, text: str) -> str:
        """A text may be named by its path, or as a folder is; no two share one folder."""
        plain = re.sub(r"[^\w.-]+", "_", text, flags=re.ASCII).lstrip(".")[:100]
        own = "" if plain == text else "-" + hashlib.sha256(as_bytes(text)).hexdigest()[:8]
        return f"adapted/{plain}{own}"

    def adapted_path(self, text: str, index: int) -> Path:
        """Where a block's parameters adapted to a text are, apart from the learned ones."""
        return self.path / self._adapted_folder(text) / f"{index:04d}.safetensors"

    def _diagnostics_name(self, index: int) -> str:
        return f"diagnostics/{index:04d}.safetensors"

    def diagnostics_path(self, index: int) -> Path:
        """Where the report's figures of a block are, if they were taken."""
        return self.path / self._diagnostics_name(index)

    def forget_adapted(self, text: str) -> None:
        """Remove the parameters that were adapted to `text` earlier."""
        folder = self._inside(self._adapted_folder(text)) + "/"
        names = [name for name in self.journal.ever_listed() if name.startswith(folder)]
        self.journal.require_own(names)
        for name in names:
            if self.journal.owns(name):
                self.journal.remove(name)

    @cached_property
    def tower(self) -> RunFolder:
        """Where the vision tower's blocks are, in files of the same names."""
        return RunFolder(self.journal.folder, "tower")

    def finished_blocks(self) -> int:
        """How many blocks, from the first on, are finished: there, and one after the other."""
        return self._chain.finished()

    def _all_finished_blocks(self) -> int:
        return self.finished_blocks() + self.tower.finished_blocks()

    def require_finished(self) -> None:
        """Refuse a run of which blocks are still to be learned, or not as they were learned."""
        identity = self.identity
        blocks = identity["model"]["blocks"] + identity.get("tower", {}).get("blocks", 0)
        finished = self._all_finished_blocks()
        if finished < blocks:
            raise LRQuantError(
                f"run folder {self.path}: {finished} of {blocks} blocks are finished; go on with "
                "--resume and the run's own --epochs first"
            )
        for part in (self, self.tower):
            for index in range(part.finished_blocks()):
                part._read(part._block_name(index))

    def save_block(self, parameters: dict[str, Tensor], record: BlockRecord) -> None:
        """Finish a block: its line in blocks.jsonl, then its parameters.

        The file holds nothing that a clock or the machine's state decides, so that two runs give
        the same bytes.
        """
        self._write_records([*self.records()[: record.block], record])
        after = self._chain.hash_before(record.block)
        self._save(self._block_name(record.block), parameters, record.repeatable(), after)

    def save_adapted(self, text: str, index: int, parameters: dict[str, Tensor]) -> None:
        """Keep a block's parameters adapted to `text`; the learned ones stay as they are."""
        self._save(f"{self._adapted_folder(text)}/{index:04d}.safetensors", parameters, {})

    def save_diagnostics(
        self, index: int, figures: dict[str, Any], tensors: dict[str, Tensor]
    ) -> None:
        """Keep a block's figures for the report; before `save_block`, so that none is missing."""
        self._save(self._diagnostics_name(index), tensors, figures)

    def load_diagnostics(self, index: int) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """A block's figures and tensors, None if they were not taken."""
        if not self.diagnostics_path(index).exists():
            return None
        file = self._load(self._diagnostics_name(index))
        return file.about, file.tensors

    def load_block(self, index: int, adapted: str | None = None) -> dict[str, Tensor]:
        """A finished block's learned parameters, or those adapted to the text `adapted`."""
        name = self._block_name(index)
        if adapted is not None:
            name = f"{self._adapted_folder(adapted)}/{index:04d}.safetensors"
        return self._load(name).tensors

    def _save(
        self, name: str, tensors: dict[str, Tensor], about: dict[str, Any], after: str = ""
    ) -> None:
        name = self._inside(name)
        content = LearnedFile(digest(self.identity), name, about, tensors, after).content()
        try:
            self.journal.write(name, content)
        except OSError as error:
            raise LRQuantError(
                f"run folder {self.journal.folder}: {name} cannot be written ({error.strerror}); "
                "free some space and go on with --resume"
            ) from error

    def _load(self, name: str, run: str | None = None) -> LearnedFile:
        """A file of tensors, of the run whose digest is `run`, this one if none is given."""
        name = self._inside(name)
        path = self.journal.folder / name
        mend = mend_of(name)
        file = LearnedFile.read(path, self.journal.read(name), mend)
        if file.run != (run or digest(self.identity)):
            raise LRQuantError(f"{path}: of a run with another model, scheme or data; {mend}")
        if file.name != name:
            raise LRQuantError(f"{path}: was written as {file.name}; {mend}")
        return file

    def records(self, damaged_too: bool = False) -> list[BlockRecord]:
        """The records of the finished blocks, in order; from the blocks where lines are missing.

        With `damaged_too`, from the blocks alone where blocks.jsonl is damaged.
        """
        if damaged_too and self._lines_are_damaged():
            return [self._record(index, None) for index in range(self.finished_blocks())]
        kept = {record.block: record for record in self._lines()}
        return [self._record(index, kept.get(index)) for index in range(self.finished_blocks())]

    def _lines(self) -> list[BlockRecord]:
        """What blocks.jsonl says."""
        path = self.path / "blocks.jsonl"
        if not path.exists():
            return []
        try:
            lines = self._read("blocks.jsonl").splitlines()
            return [BlockRecord(**json_object(line)) for line in lines]
        except (ValueError, TypeError) as error:
            mend = mend_of(self._inside(path.name))
            raise LRQuantError(f"{path}: not the records of blocks; {mend}") from error

    def _lines_are_damaged(self) -> bool:
        """Whether blocks.jsonl is this run's and no longer what was written; the log says so."""
        path = self.path / "blocks.jsonl"
        if not is_regular(path) or self._inside(path.name) not in self.journal.listed():
            return False
        try:
            self._lines()
        except LRQuantError as error:
            if isinstance(error.__cause__, OSError):
                raise
            words = "%s: damaged; its records are taken from the blocks, without seconds and memory"
            logger.warning(words, path)
            return True
        return False

    def mend_records(self) -> None:
        """Write a damaged blocks.jsonl anew from the blocks, as far as these are undamaged."""
        for part in (self, self.tower):
            if part._lines_are_damaged():
                found = [part._chain.about(index) for index in range(part.finished_blocks())]
                whole = itertools.takewhile(lambda about: about is not None, found)
                part._write_records([BlockRecord.from_repeatable(x) for x in whole if x], True)

    def _record(self, index: int, line: BlockRecord | None) -> BlockRecord:
        """A block's record: its line, if that is of the file that is there, or as the file says."""
        if line is not None:
            about = self._chain.about(index)
            if about is None or json.dumps(about) == json.dumps(line.repeatable()):
                return line
        return BlockRecord.from_repeatable(self._load(self._block_name(index)).about)

    def _write_records(self, records: list[BlockRecord], damaged_too: bool = False) -> None:
        lines = "".join(record.as_line() + "\n" for record in records)
        self.write_text("blocks.jsonl", lines, damaged_too)

    def copy_blocks(self, other: RunFolder) -> None:
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
            self._write_records([*self.records(), *other.records(damaged_too=True)[first:]])
        for index in range(first, finished):
            if other.diagnostics_path(index).is_file():
                self._copy(other, self._diagnostics_name(index))
            self._copy(other, self._block_name(index))
        if not self._part:
            self.tower.copy_blocks(other.tower)

    def _copy(self, other: RunFolder, name: str) -> None:
        content = other._read(name)
        try:
            self.journal.write(self._inside(name), content)
        except OSError as error:
            raise LRQuantError(
                f"run folder {self.path}: the blocks of {other.path} cannot be copied "
                f"({error.strerror}); free some space, or go on in place with --resume alone"
            ) from error

    def results(self) -> dict[str, Any]:
        """What results.json holds, nothing if there is none."""
        if not (self.path / "results.json").exists():
            return {}
        return json_object(self._read("results.json"))

    def add_results(self, results: dict[str, Any]) -> dict[str, Any]:
        """Write results.json, keeping of the old one what `results` did not measure."""
        results = merge_results(self.results(), results)
        self.write_text("results.json", json.dumps(results, indent=1) + "\n")
        return results

    @contextmanager
    def logging(self, logger: logging.Logger, earlier: MemoryHandler) -> Iterator[None]:
        """Write what `logger` says, from INFO on, to run.log too, after what `earlier` kept.

        A log that cannot be written is no reason to stop.
        """
        handler: logging.Handler = logging.NullHandler()
        try:
            handler = LogFile(self.journal.claim_growing("run.log"), encoding="utf-8")
        except OSError as error:
            logger.warning("run.log cannot be written (%s)", error.strerror)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        earlier.setTarget(handler)
        earlier.flush()
        logger.removeHandler(earlier)
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            handler.close()

    def write_text(self, name: str, text: str, damaged_too: bool = False) -> None:
        """Write a small file so that it is whole or absent; over a damaged one only if asked."""
        try:
            self.journal.write(self._inside(name), text, damaged_too)
        except OSError as error:
            raise self._unwritable(name, error) from error

    def _read(self, name: str) -> bytes:
        return self.journal.read(self._inside(name))

    def _inside(self, name: str) -> str:
        """The path of a file of this part in the whole folder."""
        return f"{self._part}/{name}" if self._part else name

    def _unwritable(self, name: str, error: OSError) -> LRQuantError:
        return LRQuantError(
            f"run folder {self.path}: {name} cannot be written ({error.strerror}); free some space "
            "or use another --output_dir"
        )
