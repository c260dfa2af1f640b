"""Hidden states between two blocks, on the device, the host or disk."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lrquant.blocks.handed import HandedOn, States, moved
from lrquant.errors import LRQuantError
from lrquant.files.whole import temporary_file


class Batch(NamedTuple):
    """Samples that go through a block together: `rows` of a stream, of leading `shape`.

    The shape is (samples, tokens), or (patches,) where a tower packs its pictures.
    """

    samples: slice
    rows: slice
    shape: tuple[int, ...]


def batches_of(samples: Sequence[slice], shapes: Sequence[tuple[int, ...]]) -> list[Batch]:
    """Batches one after the other in a stream."""
    batches: list[Batch] = []
    start = 0
    for rows, shape in zip(samples, shapes, strict=True):
        end = start + math.prod(shape)
        batches.append(Batch(rows, slice(start, end), tuple(shape)))
        start = end
    return batches


class Stream:
    """Hidden states of all samples between two blocks: (rows, hidden) in one dtype.

    A row is a token.  `storage` is "device", "host" or "disk"; on disk the states are a
    memory-mapped file that is reserved in full at the start and unlinked at once, so that no kill
    leaves it behind.  `added` holds, by (first row, block), what the model adds to a batch's
    states before that block, `handed` by first row what blocks left for later ones.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        storage: str,
        folder: Path | None = None,
    ) -> None:
        self.device = device
        self.added: dict[tuple[int, int], Tensor] = {}
        self.handed: dict[int, States] = {}
        if storage == "disk":
            self.states = _mapped_tensor(shape, dtype, folder)
        else:
            place = device if storage == "device" else torch.device("cpu")
            self.states = torch.empty(shape, dtype=dtype, device=place)

    def read(self, batch: Batch, block: int | None = None) -> Tensor:
        """States (*shape, hidden) of a batch on the computing device, float32.

        With `block` they are that block's inputs: what the model adds before it is added.
        """
        states = self.states[batch.rows]
        if self.on_host:
            states = states.pin_memory()
        states = states.to(self.device, non_blocking=self.on_host)  # as they are stored
        states = states.float().unflatten(0, batch.shape)
        added = None if block is None else self.added_before(batch, block)
        return states if added is None else states + added

    def added_before(self, batch: Batch, block: int) -> Tensor | None:
        """What the model adds to a batch's states before a block, (*shape, hidden) float32."""
        added = self.added.get((batch.rows.start, block))
        if added is None:
            return None
        return added.to(self.device, torch.float32).unflatten(0, batch.shape)

    def handed_on(self, batch: Batch) -> HandedOn:
        """What blocks before left for those to come, on the computing device, float32."""
        return HandedOn(moved(self.handed.get(batch.rows.start, {}), self.device, torch.float32))

    def hand_on(self, batch: Batch, states: HandedOn, before: Stream) -> None:
        """Keep what a block left, and what those before it did in the stream that it read."""
        if states:
            new = moved(states.new, self.states.device, self.states.dtype)
            start = batch.rows.start
            self.handed[start] = {**before.handed.get(start, {}), **new}

    def write(self, batch: Batch, states: Tensor) -> None:
        """Replace the states of a batch."""
        rows = states.flatten(0, -2)
        self.states[batch.rows] = rows.to(self.states.dtype)

    def copy(self, other: Stream) -> None:
        """Take over another stream's states."""
        self.states.copy_(other.states)
        self.added = other.added
        self.handed = dict(other.handed)

    @property
    def on_host(self) -> bool:
        """Whether states have a way to go to a CUDA device that computes with them."""
        return self.device.type == "cuda" and self.states.device.type == "cpu"

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.states.nbytes


def _mapped_tensor(shape: Sequence[int], dtype: torch.dtype, folder: Path | None) -> Tensor:
    elements = int(torch.Size(shape).numel())
    size = elements * torch.empty((), dtype=dtype).element_size()
    try:
        handle, path = temporary_file(folder or Path(tempfile.gettempdir()))
    except OSError as error:
        raise LRQuantError(
            f"no file for hidden states can be made in {folder} ({error.strerror}); use "
            "--offload host or another --output_dir"
        ) from error
    try:
        os.posix_fallocate(handle, 0, size)
        return torch.from_file(str(path), shared=True, size=elements, dtype=dtype).view(*shape)
    except OSError as error:
        raise LRQuantError(
            f"no space for {size / 2**30:.1f} GiB of hidden states in {folder} ({error.strerror}); "
            "free some, use --offload host, or fewer or shorter samples"
        ) from error
    finally:
        os.close(handle)
        os.unlink(path)
