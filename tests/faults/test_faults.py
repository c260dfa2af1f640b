"""Some of the faults of `make faults`, drawn by a seed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

MATRIX = Path(__file__).with_name("matrix.py")


def test_nothing_is_lost_or_wrong_in_some_of_the_cases():
    command = [sys.executable, str(MATRIX), "--share", "0.012", "--stories", "4"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    rows = [row.split("|")[2:5] for row in result.stdout.splitlines() if row.startswith("| ")][2:]
    assert len(rows) == 4
    assert all(int(lost) == int(wrong) == 0 for _, lost, wrong in rows)
