"""The run folder: what a run is, one file a finished block, and resuming it."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lrquant.config import Config
from lrquant.errors import LRQuantError
from lrquant.files import LogFile, copy_whole, flush, read_json, save_file, write_whole
from lrquant.results import merge_results

FORMAT = 1


@dataclass(frozen=True)
class BlockRecord:
    """Numbers of one finished block, as in blocks.jsonl."""

    block: int
    initial_loss: float
    final_loss: float
    epoch_losses: list[float]
    seconds: float
    peak_memory_bytes: int
    non_finite: list[str]
    held_losses: list[float] = field(default_factory=list)
    best_epoch: int | None = None

    def as_line(self) -> str:
        """One line of blocks.jsonl."""
        return json.dumps(vars(self))


class RunFolder:
    """`config.yaml`, `run.json` (what must match to resume), `blocks/`, `blocks.jsonl`, results.

    `diagnostics/`, where a report is asked for, has what a block looked like when it was learned.

    A block is finished when its file exists: files are written under a temporary name, flushed and
    renamed, so a kill at any point leaves whole files only.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, config: Config, identity: dict[str, Any]) -> RunFolder:
        """Start a new run; an old run in the same folder is replaced."""
        folder = cls(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            blocks = path / "blocks"
            blocks.mkdir(exist_ok=True)
            reports = ("report.html", "report.md", "report.json")
            for old in ("run.json", "blocks.jsonl", "results.json", *reports):
                (path / old).unlink(missing_ok=True)
            for learned in (*blocks.glob("*.safetensors"), *blocks.glob("*.tmp")):
                learned.unlink()
            for derived in ("adapted", "diagnostics", "tower"):
                shutil.rmtree(path / derived, ignore_errors=True)
            folder.write_text("config.yaml", config.to_yaml())
            folder.write_text(
                "run.json", json.dumps({"format": FORMAT, **identity}, indent=1) + "\n"
            )
        except OSError as error:
            raise LRQuantError(
                f"run folder {path}: cannot be written ({error.strerror}); use another --output_dir"
            ) from error
        return folder

    @classmethod
    def start(
        cls, path: Path, config: Config, identity: dict[str, Any], resume: Path | None
    ) -> RunFolder:
        """A new run, or the run in `resume` to go on with; elsewhere than in `path`, a copy of it.

        `identity` must equal that of the resumed run.  A run in `path` is replaced only if the
        settings say `overwrite`.
        """
        if resume is not None:
            source = cls.open(resume)
            source.require_same(identity)
            if resume.resolve() == path.resolve():
                return source
        cls(path).require_replaceable(config)
        folder = cls.create(path, config, identity)
        if resume is None:
            return folder
        folder.copy_blocks(source)
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run."""
        if not (path / "run.json").is_file():
            raise LRQuantError(f"run folder {path}: no run here (run.json is missing)")
        folder = cls(path)
        version = folder.identity.get("format")
        if version != FORMAT:
            raise LRQuantError(
                f"run folder {path}: format {version}, this version reads format {FORMAT}"
            )
        return folder

    def require_replaceable(self, config: Config) -> None:
        """Refuse to replace learned blocks, unless the settings say `overwrite`."""
        learned = self.finished_blocks() + self.tower.finished_blocks()
        if learned and not config.overwrite:
            raise LRQuantError(
                f"run folder {self.path}: holds a run of {learned} learned blocks; go on with "
                "--resume, replace it with --overwrite, or use another --output_dir"
            )

    @property
    def identity(self) -> dict[str, Any]:
        """Model, scheme, method and data of the run."""
        return read_json(self.path / "run.json")

    @property
    def config(self) -> Config:
        """The resolved settings that the run was started with."""
        return Config.from_yaml(self.path / "config.yaml")

    def require_same(self, identity: dict[str, Any]) -> None:
        """Refuse to go on with a run of another model, scheme, method or data."""
        found, wanted = _flat(self.identity), _flat(identity)
        towers = {key: None for key in found if key.startswith("tower ")}
        for key, value in ({**towers, **wanted} if "data set" in wanted else wanted).items():
            if key == "calibration" or found.get(key) == value:
                continue
            words = found.get("calibration"), wanted.get("calibration")
            if key.startswith("data ") and words[0] != words[1]:
                key = "calibration"
            raise LRQuantError(
                f"run folder {self.path}: its {key} differs: the run has {found.get(key)!r}, this "
                f"command {wanted.get(key)!r}; use the same settings or another --output_dir"
            )

    def block_path(self, index: int) -> Path:
        """Where a block's learned parameters are."""
        return self.path / "blocks" / f"{index:04d}.safetensors"

    def adapted_path(self, text: str, index: int) -> Path:
        """Where a block's parameters adapted to a text are, apart from the learned ones."""
        folder = re.sub(r"[^\w.-]+", "_", text)  # a text may be named by its path
        return self.path / "adapted" / folder / f"{index:04d}.safetensors"

    def diagnostics_path(self, index: int) -> Path:
        """Where the report's figures of a block are, if they were taken."""
        return self.path / "diagnostics" / f"{index:04d}.safetensors"

    def forget_adapted(self, text: str) -> None:
        """Make an empty folder for parameters that are adapted to `text`."""
        place = self.adapted_path(text, 0).parent
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)

    @property
    def tower(self) -> RunFolder:
        """Where the vision tower's blocks are, in files of the same names."""
        return RunFolder(self.path / "tower")

    def finished_blocks(self) -> int:
        """How many blocks, from the first on, are finished."""
        count = 0
        while self.block_path(count).is_file():
            count += 1
        return count

    def require_finished(self) -> None:
        """Refuse a run of which blocks are still to be learned."""
        identity = self.identity
        in_tower = identity.get("tower", {}).get("blocks", 0)
        finished = self.finished_blocks() + self.tower.finished_blocks()
        blocks = identity["model"]["blocks"] + in_tower
        if finished < blocks:
            raise LRQuantError(
                f"run folder {self.path}: {finished} of {blocks} blocks are finished; go on with "
                "--resume and the run's own --epochs first"
            )

    def save_block(self, parameters: dict[str, Tensor], record: BlockRecord) -> None:
        """Finish a block: its line in blocks.jsonl, then its parameters.

        The file holds nothing that a clock or the machine's state decides, so that two runs give
        the same bytes.
        """
        path = self.block_path(record.block)
        self._save(path, parameters, lambda: self._write_records([*self.records(), record]))

    def save_adapted(self, text: str, index: int, parameters: dict[str, Tensor]) -> None:
        """Keep a block's parameters adapted to `text`; the learned ones stay as they are."""
        self._save(self.adapted_path(text, index), parameters, lambda: None)

    def save_diagnostics(
        self, index: int, figures: dict[str, Any], tensors: dict[str, Tensor]
    ) -> None:
        """Keep a block's figures for the report; before `save_block`, so that none is missing."""
        metadata = {"figures": json.dumps(figures)}
        self._save(self.diagnostics_path(index), tensors, lambda: None, metadata)

    def load_diagnostics(self, index: int) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """A block's figures and tensors, None if they were not taken."""
        path = self.diagnostics_path(index)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                figures = json.loads((file.metadata() or {})["figures"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise LRQuantError(
                f"{path}: corrupt; delete it, the report then says that it is missing"
            ) from error
        return figures, tensors

    def _save(
        self,
        path: Path,
        parameters: dict[str, Tensor],
        before_rename: Callable[[], None],
        metadata: dict[str, str] | None = None,
    ) -> None:
        tensors = {name: value.detach().cpu().contiguous() for name, value in parameters.items()}
        temporary = path.with_suffix(".tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, temporary, metadata)
            flush(temporary)
            before_rename()
            temporary.replace(path)
        except (OSError, SafetensorError) as error:
            raise LRQuantError(
                f"run folder {self.path}: block {int(path.stem)} cannot be written ({error}); free "
                "some space and go on with --resume"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)

    def load_block(self, index: int, adapted: str | None = None) -> dict[str, Tensor]:
        """A finished block's learned parameters, or those adapted to the text `adapted`."""
        path = self.block_path(index) if adapted is None else self.adapted_path(adapted, index)
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise LRQuantError(
                f"run folder {self.path}: {path.name} is missing or corrupt; delete it and the "
                "blocks after it, and go on with --resume"
            ) from error

    def records(self) -> list[BlockRecord]:
        """The records of the finished blocks, in order."""
        path = self.path / "blocks.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        try:
            records = [BlockRecord(**json.loads(line)) for line in lines]
        except (ValueError, TypeError) as error:
            raise LRQuantError(f"{path}: corrupt; delete it and go on with --resume") from error
        return [record for record in records if record.block < self.finished_blocks()]

    def _write_records(self, records: list[BlockRecord]) -> None:
        self.write_text("blocks.jsonl", "".join(record.as_line() + "\n" for record in records))

    def copy_blocks(self, other: RunFolder) -> None:
        """Take over another run's finished blocks and their records."""
        try:
            self._write_records(other.records())
            for index in range(other.finished_blocks()):
                if other.diagnostics_path(index).is_file():
                    copy_whole(other.diagnostics_path(index), self.diagnostics_path(index))
                copy_whole(other.block_path(index), self.block_path(index))
            if other.tower.finished_blocks():
                (self.tower.path / "blocks").mkdir(parents=True, exist_ok=True)
                self.tower.copy_blocks(other.tower)
        except OSError as error:
            raise LRQuantError(
                f"run folder {self.path}: the blocks of {other.path} cannot be copied "
                f"({error.strerror}); free some space, or go on in place with --resume alone"
            ) from error

    def add_results(self, results: dict[str, Any]) -> dict[str, Any]:
        """Write results.json, keeping of the old one what `results` did not measure."""
        path = self.path / "results.json"
        if path.is_file():
            results = merge_results(read_json(path), results)
        self.write_text("results.json", json.dumps(results, indent=1) + "\n")
        return results

    @contextmanager
    def logging(self, logger: logging.Logger, earlier: MemoryHandler) -> Iterator[None]:
        """Write what `logger` says, from INFO on, to run.log too, after what `earlier` kept."""
        handler = LogFile(self.path / "run.log", encoding="utf-8")
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

    def write_text(self, name: str, text: str) -> None:
        """Write a small file so that it is whole or absent."""
        try:
            write_whole(self.path / name, text)
        except OSError as error:
            raise LRQuantError(
                f"run folder {self.path}: {name} cannot be written ({error.strerror}); free some "
                "space or use another --output_dir"
            ) from error


def _flat(identity: dict[str, Any]) -> dict[str, Any]:
    """{"data": {"set": x}} -> {"data set": x}."""
    flat: dict[str, Any] = {}
    for key, value in identity.items():
        parts = value.items() if isinstance(value, dict) else ()
        flat.update({f"{key} {part}": inner for part, inner in parts} or {key: value})
    return flat
