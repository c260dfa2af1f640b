"""The records of a part's blocks: blocks.jsonl, made anew from the blocks where it is damaged."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Iterable

from lrquant.errors import LRQuantError
from lrquant.files.whole import JsonObject, is_regular, json_object
from lrquant.runs.block_file import BlockRecord
from lrquant.runs.chain import Chain
from lrquant.runs.journal import Journal
from lrquant.runs.mends import mend_of

logger = logging.getLogger("lrquant")


class Records:
    """A line a block in the file `name` of a run; `chain` has the blocks that the lines are of.

    `load` gives what a block's own file says of its learning, and `write` writes the lines, over a
    damaged file too if asked.
    """

    def __init__(
        self,
        journal: Journal,
        name: str,
        chain: Chain,
        load: Callable[[int], JsonObject],
        write: Callable[[str, bool], None],
    ) -> None:
        self._journal, self._name, self._chain = journal, name, chain
        self._load, self._write_text = load, write
        self._last: BlockRecord | None = None
        self._text = ""  # the lines up to that of the last block

    def all(self, damaged_too: bool = False) -> list[BlockRecord]:
        """Those of the finished blocks, in order; from the blocks where lines are missing.

        With `damaged_too`, from the blocks alone where the file is damaged.
        """
        damaged = damaged_too and self._is_damaged()
        lines = {} if damaged else {record.block: record for record in self._lines()}
        return [self._of_block(i, lines.get(i)) for i in range(self._chain.finished())]

    def add(self, record: BlockRecord) -> None:
        """Write a block's line behind those of the blocks before it, which are read only once."""
        last = self._last
        if last is None or last.block != record.block - 1 or not self._is_of_its_file(last):
            self._text = _as_text(self.all()[: record.block])
        self._text += _as_text([record])
        self._last = record
        self._write_text(self._text, False)

    def write(self, records: Iterable[BlockRecord]) -> None:
        """Write the lines of all blocks."""
        self._write_text(_as_text(records), False)

    def mend(self) -> None:
        """Write a damaged file anew from the blocks, as far as these are undamaged."""
        if self._is_damaged():
            headers = (self._chain.about(index) for index in range(self._chain.finished()))
            whole = itertools.takewhile(lambda about: about is not None, headers)
            records = [BlockRecord.from_repeatable(about) for about in whole if about]
            self._write_text(_as_text(records), True)

    def _lines(self) -> list[BlockRecord]:
        """What the file says, nothing if there is none."""
        path = self._journal.folder / self._name
        if not path.exists():
            return []
        try:
            lines = self._journal.read(self._name).splitlines()
            return [BlockRecord(**json_object(line)) for line in lines]
        except (ValueError, TypeError) as error:
            raise LRQuantError(
                f"{path}: not the records of blocks; {mend_of(self._name)}"
            ) from error

    def _is_damaged(self) -> bool:
        """Whether the file is the run's and no longer what was written; the log says so."""
        path = self._journal.folder / self._name
        if not is_regular(path) or self._name not in self._journal.listed():
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

    def _of_block(self, index: int, line: BlockRecord | None) -> BlockRecord:
        """A block's record: its line, if that is of the file that is there, or as the file says."""
        if line is not None and self._is_of_its_file(line):
            return line
        return BlockRecord.from_repeatable(self._load(index))

    def _is_of_its_file(self, line: BlockRecord) -> bool:
        about = self._chain.about(line.block)
        return about is None or json.dumps(about) == json.dumps(line.repeatable())


def _as_text(records: Iterable[BlockRecord]) -> str:
    return "".join(record.as_line() + "\n" for record in records)
