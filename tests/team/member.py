"""A process of a team, started by torchrun: `member.py FOLDER HOW` writes FOLDER/RANK.json."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch

from lrquant.errors import LRQuantError
from lrquant.team.processes import joined

SPOKEN = [
    [1.0, 1e8],
    [2.0, 1.0],
    [4.0, -1e8],
    [8.0, 3.0],
    [16.0, 5.0],
]  # rows, of one or of several


def rows_of(team):
    """The member's own rows: of two the first has three."""
    counts = [5] if team.size == 1 else [3, 2]
    first = sum(counts[: team.rank])
    return torch.tensor(SPOKEN[first : first + counts[team.rank]]), counts


def speak(team):
    said = {"size": team.size, "each": team.each({"rank": team.rank})}
    said["first"] = team.first(lambda: f"made by {team.rank}")
    said["sum"] = team.ordered_sum(*rows_of(team)).tolist()
    own = torch.zeros((0, 3)) if team.rank else torch.ones((1, 3))
    said["of the first alone"] = team.ordered_sum(own, [1, 0]).tolist()
    return said


def main() -> int:
    folder, how = Path(sys.argv[1]), sys.argv[2]
    try:
        for _ in range(2):  # a process may join more than once
            with joined() as team:
                said = speak(team)
                if how.startswith("raise") and how.endswith(str(team.rank)):
                    raise LRQuantError("no such thing; use another")
                if how == "raise all":
                    raise LRQuantError("refused alike")
                if how == "kill" and team.rank == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                team.first(lambda: None)
    except LRQuantError as error:
        sys.stderr.write(f"lrquant: {error}\n")
        return 2
    (folder / f"{team.rank}.json").write_text(json.dumps(said))
    return 0


if __name__ == "__main__":
    sys.exit(main())
