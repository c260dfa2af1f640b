"""Processes that torchrun starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lrquant

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
LONGEST = 300  # seconds after which a test that hangs ends


@pytest.fixture
def start():
    """start(size, *words) -> exit code, and the lines of `lrquant` on standard error."""

    def run(size: int, *words: object) -> tuple[int, list[str]]:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment["PYTHONPATH"] = str(Path(lrquant.__file__).parents[1])
        ended = subprocess.run(
            [*TORCHRUN, str(size), *map(str, words)],
            env=environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            timeout=LONGEST,
            check=False,
        )
        lines = [line for line in ended.stderr.splitlines() if line.startswith("lrquant: ")]
        return ended.returncode, lines

    return run
