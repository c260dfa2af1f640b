"""A launch: how many processes were started for one command, and which of them this is."""

from __future__ import annotations

import os
from dataclasses import dataclass

from lrquant.errors import LRQuantError


@dataclass(frozen=True)
class Launch:
    """`rank` of `size` processes, from 0, and the `local_rank` among those of its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def of_environment(cls) -> Launch:
        """What torchrun, or another launcher, says by RANK, WORLD_SIZE and LOCAL_RANK.

        Without both of the first two a process is alone.
        """
        said = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        if said["RANK"] is None or said["WORLD_SIZE"] is None:
            return cls()
        try:
            rank, size, local = (int(value or 0) for value in said.values())
        except ValueError as error:
            raise LRQuantError(
                f"RANK {said['RANK']!r}, WORLD_SIZE {said['WORLD_SIZE']!r}, LOCAL_RANK "
                f"{said['LOCAL_RANK']!r}: no numbers; start with torchrun, or unset them"
            ) from error
        return cls(rank, size, local) if size > 1 else cls()
