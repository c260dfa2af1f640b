"""The run folder: what a run is, one file a finished block, and resuming it."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lrquant.config import Config
from lrquant.errors import LRQuantError

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

    def as_line(self) -> str:
        """One line of blocks.jsonl."""
        return json.dumps(vars(self))


class RunFolder:
    """`config.yaml`, `run.json` (what must match to resume), `blocks/`, `blocks.jsonl`, results.

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
            for old in ("run.json", "blocks.jsonl", "results.json"):
                (path / old).unlink(missing_ok=True)
            shutil.rmtree(path / "blocks", ignore_errors=True)
            (path / "blocks").mkdir()
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

        `identity` must equal that of the resumed run.
        """
        if resume is None:
            return cls.create(path, config, identity)
        source = cls.open(resume)
        source.require_same(identity)
        if resume.resolve() == path.resolve():
            return source
        folder = cls.create(path, config, identity)
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

    @property
    def identity(self) -> dict[str, Any]:
        """Model, scheme, method and data of the run."""
        try:
            return json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise LRQuantError(f"run folder {self.path}: run.json is corrupt") from error

    @property
    def config(self) -> Config:
        """The resolved settings that the run was started with."""
        return Config.from_yaml(self.path / "config.yaml")

    def require_same(self, identity: dict[str, Any]) -> None:
        """Refuse to go on with a run of another model, scheme, method or data."""
        found = self.identity
        for key, value in identity.items():
            if key != "calibration" and found.get(key) != value:
                raise LRQuantError(
                    f"run folder {self.path}: its {key} differs: the run has {found.get(key)!r}, "
                    f"this command {value!r}; use the same settings or another --output_dir"
                )

    def block_path(self, index: int) -> Path:
        """Where a block's learned parameters are."""
        return self.path / "blocks" / f"{index:04d}.safetensors"

    def finished_blocks(self) -> int:
        """How many blocks, from the first on, are finished."""
        count = 0
        while self.block_path(count).is_file():
            count += 1
        return count

    def save_block(self, parameters: dict[str, Tensor], record: BlockRecord) -> None:
        """Finish a block: its line in blocks.jsonl, then its parameters.

        The file holds nothing that a clock or the machine's state decides, so that two runs give
        the same bytes.
        """
        tensors = {name: value.detach().cpu().contiguous() for name, value in parameters.items()}
        path = self.block_path(record.block)
        temporary = path.with_suffix(".tmp")
        try:
            save_file(tensors, temporary)
            _flush(temporary)
            with (self.path / "blocks.jsonl").open("a", encoding="utf-8") as lines:
                lines.write(record.as_line() + "\n")
            temporary.replace(path)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise LRQuantError(
                f"run folder {self.path}: block {record.block} cannot be written ({error}); free "
                "some space and go on with --resume"
            ) from error

    def load_block(self, index: int) -> dict[str, Tensor]:
        """A finished block's learned parameters."""
        path = self.block_path(index)
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise LRQuantError(
                f"run folder {self.path}: {path.name} is missing or corrupt; delete it and the "
                "blocks after it, and go on with --resume"
            ) from error

    def records(self) -> list[BlockRecord]:
        """The last record of each finished block, in order."""
        path = self.path / "blocks.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        latest: dict[int, BlockRecord] = {}
        for line in lines:
            try:
                record = BlockRecord(**json.loads(line))
            except (ValueError, TypeError):
                continue  # a line cut off by a kill; its block was not finished
            latest[record.block] = record
        return [latest[index] for index in sorted(latest) if index < self.finished_blocks()]

    def copy_blocks(self, other: RunFolder) -> None:
        """Take over another run's finished blocks and their records."""
        for index in range(other.finished_blocks()):
            shutil.copyfile(other.block_path(index), self.block_path(index))
        self.write_text("blocks.jsonl", "".join(r.as_line() + "\n" for r in other.records()))

    def add_results(self, results: dict[str, Any]) -> dict[str, Any]:
        """Write results.json, keeping perplexities of texts that `results` did not measure."""
        path = self.path / "results.json"
        if path.is_file():
            old = json.loads(path.read_text(encoding="utf-8"))
            results = {
                **results,
                "perplexity": {**old.get("perplexity", {}), **results["perplexity"]},
            }
        self.write_text("results.json", json.dumps(results, indent=1) + "\n")
        return results

    @contextmanager
    def logging(self, logger: logging.Logger) -> Iterator[None]:
        """Write what `logger` says to run.log too."""
        handler = logging.FileHandler(self.path / "run.log", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            handler.close()

    def write_text(self, name: str, text: str) -> None:
        """Write a small file so that it is whole or absent."""
        temporary = self.path / (name + ".tmp")
        temporary.write_text(text, encoding="utf-8")
        _flush(temporary)
        temporary.replace(self.path / name)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
