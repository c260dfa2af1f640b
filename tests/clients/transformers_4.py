"""Load checkpoints with transformers 4, in an environment of its own, beside the current one.

    python tests/clients/transformers_4.py --venv FOLDER --text FILE CHECKPOINT …

Makes the environment if it is not there, then for each checkpoint prints the perplexity and the
greedy text that both versions give on the same windows (`transformers_alone.py`), and how far
their log-likelihoods are apart.  Exits with 1 if version 4 fails on one, or is off by more than
`ALLOWED` on average.

Version 4 takes compressed-tensors checkpoints for float16 unless it is told a dtype, and of the
library's versions 0.15.0 unpacks zero points under it (0.13 and older cannot, 0.20 makes no room
for packed ones).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import venv
from itertools import chain
from pathlib import Path
from typing import Any

PACKAGES = ("torch==2.13.0", "transformers==4.57.6", "compressed-tensors==0.15.0", "accelerate")
ALLOWED = 1e-4  # mean distance of log-likelihoods, natural logarithms


def environment(folder: Path) -> Path:
    """The Python of an environment with transformers 4 in it, made if it is not there."""
    python = folder / "bin" / "python"
    if not (folder / ".installed").exists():
        venv.create(folder, with_pip=True)
        subprocess.run([str(python), "-m", "pip", "install", *PACKAGES], check=True)
        (folder / ".installed").touch()
    return python


def measured(python: str, checkpoint: str, options: argparse.Namespace) -> dict[str, Any]:
    """What one version makes of a checkpoint; RuntimeError with its last line if it fails."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "log_likelihoods.json"
        script = Path(__file__).resolve().with_name("transformers_alone.py")
        command = [python, str(script), checkpoint, "--text", options.text]
        command += ["--windows", str(options.windows), "--tokens", str(options.tokens)]
        command += ["--log-likelihoods", str(path)]
        environ = {**os.environ, "HF_HUB_OFFLINE": "1"}
        ended = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise RuntimeError(ended.stderr.strip().splitlines()[-1])
        result: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
        return result | {"log_likelihoods": list(chain(*json.loads(path.read_text())))}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--venv", required=True, help="folder; made if it is not there")
    parser.add_argument("--text", required=True, help="UTF-8 text, tokenised as a whole")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512, help="tokens a window")
    options = parser.parse_args()
    python, failed = environment(Path(options.venv)), 0
    for checkpoint in options.checkpoints:
        print(checkpoint, flush=True)
        try:
            found = [measured(each, checkpoint, options) for each in (sys.executable, str(python))]
        except RuntimeError as error:
            print(f"  FAILED: {error}", flush=True)
            failed = 1
            continue
        for result in found:
            version, perplexity = result["transformers"], result["perplexity"]
            print(f"  transformers {version}: perplexity {perplexity:.4f}")
            print(f"    generates {result['generated']!r}")
        pairs = zip(*(result["log_likelihoods"] for result in found), strict=True)
        apart = statistics.fmean(abs(left - right) for left, right in pairs)
        print(f"  apart: log-likelihoods {apart:.6f} on average", flush=True)
        failed |= apart > ALLOWED
    return failed


if __name__ == "__main__":
    sys.exit(main())
