"""The file of a block: its tensors, what they belong to, and what came of learning them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from lrquant.errors import LRQuantError
from lrquant.files.whole import JsonObject

_KEY = "lrquant"
_LENGTH = 8  # bytes that say how long the header is
_WHOLE_PERCENT = 9.95  # a change from which on it is told in whole per cent
_OF_THE_MACHINE = ("seconds", "peak_memory_bytes")


@dataclass(frozen=True)
class BlockRecord:
    """Numbers of one finished block, as in blocks.jsonl.

    `start_strength` is how strong a start was taken, where several were tried.
    """

    block: int
    initial_loss: float
    final_loss: float
    epoch_losses: list[float]
    seconds: float
    peak_memory_bytes: int
    non_finite: list[str]
    held_losses: list[float] = field(default_factory=list)
    best_epoch: int | None = None
    start_strength: float | None = None

    @property
    def outcome(self) -> str:
        """What learning did to the loss, in words; empty where nothing was learned."""
        if not self.epoch_losses or not self.initial_loss > 0:
            return ""
        if self.best_epoch == 0:
            return "kept the start"
        change = 100 * (self.final_loss / self.initial_loss - 1)
        if not math.isfinite(change):
            return ""
        return f"{change:+.0f} %" if abs(change) >= _WHOLE_PERCENT else f"{change:+.2g} %"

    def as_line(self) -> str:
        """One line of blocks.jsonl."""
        return json.dumps(vars(self))

    def repeatable(self) -> JsonObject:
        """What neither a clock nor the machine's state decides."""
        return {name: value for name, value in vars(self).items() if name not in _OF_THE_MACHINE}

    @classmethod
    def from_repeatable(cls, values: JsonObject) -> BlockRecord:
        """A record of which seconds and memory are not known: 0."""
        return cls(**{**values, **dict.fromkeys(_OF_THE_MACHINE, 0)})


@dataclass(frozen=True)
class LearnedFile:
    """`run` is a digest of what was learned, `name` the file's path in its run, `about` numbers.

    `after` is the SHA-256 of the file of the block before; empty for the first block, and for what
    is no block.  Two runs that are equal write equal bytes.
    """

    run: str
    name: str
    about: JsonObject
    tensors: dict[str, Tensor]
    after: str = ""

    def content(self) -> bytes:
        """The file, safetensors with the rest as its metadata."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.tensors.items()}
        rest = {"run": self.run, "name": self.name, "after": self.after, "about": self.about}
        return safetensors.torch.save(tensors, {_KEY: json.dumps(rest)})

    @classmethod
    def read(cls, path: Path, content: bytes, mend: str) -> LearnedFile:
        """The file that `content` of `path` is; LRQuantError with `mend` if it is none."""
        try:
            header = header_of(content)
            tensors = dict(sorted(safetensors.torch.load(content).items()))
        except (SafetensorError, ValueError) as error:
            raise LRQuantError(f"{path}: not a file of a learned block; {mend}") from error
        return cls(header.run, header.name, header.about, tensors, header.after)


@dataclass(frozen=True)
class Header:
    """What a file says beside its tensors, as `LearnedFile` has it."""

    run: str
    name: str
    after: str
    about: JsonObject


def header_of(content: bytes) -> Header:
    """What a file's header says beside its tensors; ValueError if it says nothing of the kind."""
    try:
        end = _LENGTH + int.from_bytes(content[:_LENGTH], "little")
        rest = json.loads(json.loads(content[_LENGTH:end])["__metadata__"][_KEY])
        return Header(*(rest[name] for name in ("run", "name", "after", "about")))
    except (LookupError, TypeError, RecursionError) as error:
        raise ValueError("not the header of a block") from error
