"""`lrquant` with an index of one task; rank 1 refuses to answer where FAILING is set."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from lm_eval import tasks

from lrquant.cli import main
from lrquant.errors import LRQuantError
from lrquant.measures.harness import building, sharing
from lrquant.team.launch import Launch


def refuse(*work: object) -> None:
    raise LRQuantError("no answer; ask again")


place = Path(tasks.__file__).parent / "piqa"
index = tasks.TaskManager(include_defaults=False, include_path=[place])
building._all_tasks = lambda: index
if "FAILING" in os.environ and Launch.of_environment().rank == 1:
    sharing.answer = refuse
sys.exit(main())
