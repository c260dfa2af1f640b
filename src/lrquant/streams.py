"""Hidden states between two blocks, on the device, the host or disk."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lrquant.errors import LRQuantError


class Stream:
    """Hidden states of all samples between two blocks: (samples, tokens, hidden) in one dtype.

    `place` is "device", "host" or "disk"; on disk the states are a memory-mapped file that is
    reserved in full at the start and unlinked at once, so that no kill leaves it behind.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        place: str,
        folder: Path | None = None,
    ) -> None:
        self.device = device
        if place == "disk":
            self.states = _mapped_tensor(shape, dtype, folder)
        else:
            self.states = torch.empty(
                shape, dtype=dtype, device=device if place == "device" else "cpu"
            )

    def read(self, samples: slice) -> Tensor:
        """States of some samples on the computing device, float32."""
        return self.states[samples].to(self.device, torch.float32)

    def write(self, samples: slice, states: Tensor) -> None:
        """Replace the states of some samples."""
        self.states[samples] = states.to(self.states.device, self.states.dtype)

    def copy(self, other: Stream) -> None:
        """Take over another stream's states."""
        self.states.copy_(other.states)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.states.nbytes


def _mapped_tensor(shape: Sequence[int], dtype: torch.dtype, folder: Path | None) -> Tensor:
    elements = int(torch.Size(shape).numel())
    size = elements * torch.empty((), dtype=dtype).element_size()
    try:
        handle, path = tempfile.mkstemp(prefix="stream-", suffix=".bin", dir=folder)
    except OSError as error:
        raise LRQuantError(
            f"no file for hidden states can be made in {folder} ({error.strerror}); use "
            "--offload host or another --output_dir"
        ) from error
    try:
        os.posix_fallocate(handle, 0, size)
        return torch.from_file(path, shared=True, size=elements, dtype=dtype).view(*shape)
    except OSError as error:
        raise LRQuantError(
            f"no space for {size / 2**30:.1f} GiB of hidden states in {folder} ({error.strerror}); "
            "free some, use --offload host, or fewer or shorter samples"
        ) from error
    finally:
        os.close(handle)
        os.unlink(path)
