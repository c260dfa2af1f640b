"""A launch: how many processes were started for one command, and which of them this is."""

from __future__ import annotations

import os
from dataclasses import dataclass

from lrquant.errors import LRQuantError

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class Launch:
    """`rank` of `size` processes, from 0; `local_rank` of the `local_size` of its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def of_environment(cls) -> Launch:
        """What torchrun, or another launcher, says by RANK, WORLD_SIZE, LOCAL_RANK.

        Without both of the first two a process is alone; without LOCAL_WORLD_SIZE all are taken to
        be on one machine.
        """
        said = {name: os.environ.get(name) for name in _NAMES}
        if said["RANK"] is None or said["WORLD_SIZE"] is None:
            return cls()
        try:
            rank, size, local, together = (int(value or 0) for value in said.values())
        except ValueError as error:
            raise LRQuantError(
                f"{', '.join(f'{name} {value!r}' for name, value in said.items())}: no numbers; "
                "start with torchrun, or unset them"
            ) from error
        return cls(rank, size, local, together or size) if size > 1 else cls()
