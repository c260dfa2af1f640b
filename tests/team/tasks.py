"""`lrquant` with an index of one task.

Rank 1 refuses to answer where FAILING is set; where LARGE is, the second model fits no device, and
where SMALL is, no checkpoint does.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from lm_eval import tasks

from lrquant.blocks import placement
from lrquant.cli import main
from lrquant.errors import LRQuantError
from lrquant.measures.harness import building, sharing
from lrquant.measures.subjects import stored, subject
from lrquant.team.launch import Launch


def refuse(*work: object) -> None:
    raise LRQuantError("no answer; ask again")


asked: list[int] = []


def fits(workbench: object, processes: int) -> bool:
    asked.append(processes)
    return len(asked) != 2


place = Path(tasks.__file__).parent / "piqa"
index = tasks.TaskManager(include_defaults=False, include_path=[place])
building._all_tasks = lambda: index
if "FAILING" in os.environ and Launch.of_environment().rank == 1:
    sharing.answer = refuse
if "LARGE" in os.environ:
    subject.fits_device = fits
    placement.free_memory = lambda device: 0 if len(asked) == 2 else 1 << 60
    placement.free_room = lambda device: {"cpu": 1}
if "SMALL" in os.environ:
    stored.free_memory = placement.free_memory = lambda device: 0
    placement.free_room = lambda device: {"cpu": 1}
sys.exit(main())
