"""Losses and measures for TensorBoard, through torch's own writer (the extra `tensorboard`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lrquant.errors import LRQuantError
from lrquant.files.whole import JsonObject
from lrquant.runs.block_file import BlockRecord
from lrquant.runs.progress import Progress, Together
from lrquant.runs.results import entries, kinds

_OF_A_BLOCK = ("initial_loss", "final_loss", "seconds", "peak_memory_bytes")


def with_tensorboard(progress: Progress, folder: str | None) -> Progress:
    """`progress`, and beside it a log in `folder` if one is given."""
    return progress if folder is None else Together((progress, TensorBoardLog(folder)))


class TensorBoardLog(Progress):
    """learning/loss by step over all blocks; block/… by block; and of measures, as perplexity/….

    Flushed after each block and each measure, so that a kill loses little.
    """

    def __init__(self, folder: str) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise LRQuantError(
                f"--log_dir {folder}: tensorboard is not installed; "
                "pip install 'lrquant[tensorboard]', or leave the option out"
            ) from error
        try:
            self._writer = SummaryWriter(folder)
        except OSError as error:
            raise LRQuantError(
                f"--log_dir {folder}: cannot be written ({error.strerror}); use another folder"
            ) from error
        self._steps = 1
        self._written: dict[str, float] = {}

    @contextmanager
    def blocks(
        self, blocks: int, epochs: int, batches: int, memory: Callable[[], int]
    ) -> Iterator[None]:
        self._steps = max(epochs * batches, 1)
        yield
        self._writer.flush()

    def stepper(self, block: int, together: int = 1) -> Callable[[int, float], None]:
        def each(step: int, loss: float) -> None:
            self._writer.add_scalar("learning/loss", loss, block * self._steps + step)

        return each

    def finished(self, block: int, record: BlockRecord | None) -> None:
        if record is None:
            return
        for name in _OF_A_BLOCK:
            self._writer.add_scalar(f"block/{name}", getattr(record, name), block)
        self._writer.flush()

    def measured(self, results: JsonObject) -> None:
        for kind in kinds(results):
            for name, variants in entries(results, kind):
                for variant, scores in variants.items():
                    self._add(f"{kind}/{name} {variant}", scores)
        self._writer.flush()

    def _add(self, label: str, scores: object) -> None:
        """A number, or each one of a dictionary; words and what lies deeper are not for plots."""
        for name, value in scores.items() if isinstance(scores, dict) else [("", scores)]:
            tag = f"{label} {name.removesuffix(',none')}".strip()
            if isinstance(value, float) and self._written.get(tag) != value:
                self._written[tag] = value  # tasks are told again with each model that is added
                self._writer.add_scalar(tag, value, 0)

    def close(self) -> None:
        self._writer.close()
