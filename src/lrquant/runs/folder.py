"""The run folder: what a run is, resuming it, and what it measured."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from logging.handlers import MemoryHandler
from pathlib import Path

from torch import Tensor

from lrquant.config.config import Config
from lrquant.config.learned import BLOCKS
from lrquant.errors import LRQuantError, nearest_beside
from lrquant.files.whole import JsonObject, json_object, read_json
from lrquant.runs.block_file import BlockRecord
from lrquant.runs.claims import held, require_claimable
from lrquant.runs.journal import JOURNAL
from lrquant.runs.log import logged
from lrquant.runs.mends import AGAIN
from lrquant.runs.part import PartFolder
from lrquant.runs.results import merge_results
from lrquant.runs.sameness import difference

__all__ = ["BlockRecord", "RunFolder", "is_run"]
FORMAT = 4
WRITTEN = "calibration.safetensors"  # texts that the model wrote itself


def is_run(path: Path) -> bool:
    """Whether a folder is that of a run, whole or not."""
    return (path / "run.json").is_file()


class RunFolder(PartFolder):
    """`config.yaml`, `run.json` (what must match to resume), `results.json`, and the parts' blocks.

    `diagnostics/`, where a report is asked for, has what a block looked like when it was learned.
    """

    @classmethod
    def create(cls, path: Path, config: Config, identity: Mapping[str, object]) -> RunFolder:
        """Start a new run; an old run in the same folder is replaced."""
        folder = cls(path)
        require_claimable(path, "run")
        folder._begin("run")
        folder.write_text("config.yaml", config.to_yaml())
        folder._write_identity(identity)
        return folder

    @classmethod
    def start(
        cls, path: Path, config: Config, identity: Mapping[str, object], resume: Path | None
    ) -> RunFolder:
        """A new run, or the run in `resume` to go on with; elsewhere than in `path`, a copy of it.

        `identity` must equal that of the resumed run.  A run in `path` is replaced only if the
        settings say `overwrite`; a copy that was cut off is completed.
        """
        folder = cls(path)
        if resume is None:
            folder.require_replaceable(config.overwrite)
            return cls.create(path, config, identity)
        source = cls(resume)
        if resume.resolve() == path.resolve():
            source._go_on(config, identity)
            require_claimable(path, "run")
            return source
        with held(resume) if os.access(resume, os.W_OK) else nullcontext():
            source._go_on(config, identity)
            if config.overwrite or not folder._is_run_of(identity):
                folder.require_replaceable(config.overwrite)
                cls.create(path, config, identity)
            folder.copy_blocks(source)
            folder.tower.copy_blocks(source.tower)
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run."""
        folder = cls(path)
        if not is_run(path):
            mend = f"; restore it, or {AGAIN}" if folder._all_finished_blocks() else ""
            near = "" if path.exists() else nearest_beside(path)
            raise LRQuantError(f"run folder {path}: no run here (run.json is missing){near}{mend}")
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

    def has_run(self) -> bool:
        """Whether there is a run to go on with: blocks, or a start that was not cut off."""
        begun = is_run(self.path) and "run.json" in self.journal.listed()
        return begun or self._all_finished_blocks() > 0

    def require_format(self) -> None:
        """Refuse a run of another version, if one is here."""
        if not is_run(self.path):
            return
        version = read_json(self.path / "run.json").get("format")
        if version != FORMAT:
            raise LRQuantError(
                f"run folder {self.path}: format {version!r}, this version reads format {FORMAT}; "
                "learn again in another --output_dir"
            )

    def require_replaceable(self, overwrite: bool) -> None:
        """Refuse to replace learned blocks without `overwrite`, or what is not of a run at all."""
        require_claimable(self.path, "run")
        learned = self._all_finished_blocks()
        if learned and not overwrite:
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

    def _go_on(self, config: Config, identity: Mapping[str, object]) -> None:
        """Require that this is the run of `identity`; small files that are missing come anew."""
        if self._all_finished_blocks() and not (self.path / "run.json").exists():
            first = self if self.finished_blocks() else self.tower
            first.require_block_of(identity)
            self._write_identity(identity)
        listed = "run.json" in self.journal.listed()
        if listed and not (self.path / "config.yaml").exists():
            self.require_same(identity)
            self.write_text("config.yaml", config.to_yaml())
        RunFolder.open(self.path).require_same(identity)

    def _is_run_of(self, identity: Mapping[str, object]) -> bool:
        try:
            RunFolder.open(self.path).require_same(identity)
        except LRQuantError:
            return False
        return True

    def _write_identity(self, identity: Mapping[str, object]) -> None:
        self.write_text("run.json", json.dumps({"format": FORMAT, **identity}, indent=1) + "\n")

    @property
    def config(self) -> Config:
        """The resolved settings that the run was started with."""
        self.journal.read("config.yaml")
        return Config.from_yaml(self.journal.folder / "config.yaml")

    def require_same(self, identity: Mapping[str, object]) -> None:
        """Refuse to go on with a run of another model, scheme, method or data."""
        other = difference(self.identity, identity)
        if other is not None:
            raise LRQuantError(
                f"run folder {self.path}: {other}; use the same settings or another --output_dir"
            )

    @cached_property
    def tower(self) -> RunFolder:
        """Where the vision tower's blocks are, in files of the same names."""
        return RunFolder(self.journal.folder, "tower")

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
            part.require_as_written()
        for stage in {each.stage for each in self.config.ingredients()} - {BLOCKS}:
            paths = [self.stage(stage).path(i) for i in range(self.finished_blocks())]
            if not all(path.is_file() for path in paths):
                raise LRQuantError(
                    f"run folder {self.path}: its blocks are not {stage} yet; go on with --resume"
                )

    def keep_texts(self, texts: dict[str, Tensor]) -> None:
        """Keep token ids that the model wrote to be calibrated on, by their names."""
        self.save(WRITTEN, texts, {})

    def written_texts(self) -> dict[str, Tensor]:
        """What the model wrote for this run; nothing if it has learned on other texts."""
        return self.load(WRITTEN).tensors if (self.path / WRITTEN).is_file() else {}

    def mend_records(self) -> None:
        """Write a damaged blocks.jsonl anew from the blocks, as far as these are undamaged."""
        for part in (self, self.tower):
            part._records.mend()

    def results(self) -> JsonObject:
        """What results.json holds, nothing if there is none."""
        if not (self.path / "results.json").exists():
            return {}
        return json_object(self._read("results.json"))

    def add_results(self, results: JsonObject) -> JsonObject:
        """Write results.json, keeping of the old one what `results` did not measure."""
        results = merge_results(self.results(), results)
        self.write_text("results.json", json.dumps(results, indent=1) + "\n")
        return results

    def logging(
        self, logger: logging.Logger, earlier: MemoryHandler
    ) -> AbstractContextManager[None]:
        """Write what `logger` says to run.log too, after what `earlier` kept."""
        return logged(self.journal, logger, earlier)
