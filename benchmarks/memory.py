"""Peak memory of learning at full-size settings, from the first blocks of a run.

    python benchmarks/memory.py --model MODEL --data-dir DIR [--lr-plus] [--nsamples 128]

Starts `lrquant quantize` (W4A4, one epoch), waits until it has finished `--blocks` blocks, stops it
and prints the peak that it recorded beside the size of its hidden states.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lrquant.config.config import Config
from lrquant.learn.identity import dtype_name
from lrquant.model.device import choose_device, choose_precision
from lrquant.model.loading import load_model


def main() -> None:
    """Run, wait, stop, print."""
    options = _options()
    dtype = choose_precision("auto", choose_device("auto"))
    hidden = load_model(options.model).skeleton.config.hidden_size
    count = 3 if options.lr_plus else 2
    streams = count * options.nsamples * options.seqlen * hidden * dtype.itemsize
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "lrquant", "quantize", "--model", options.model]
        command += ["--scheme", "W4A4", "--epochs", "1", "--nsamples", str(options.nsamples)]
        command += ["--seqlen", str(options.seqlen), "--output-dir", folder]
        command += ["--offload", options.offload, "--seed", str(Config.seed)]
        command += ["--data-dir", options.data_dir] if options.data_dir else []
        command += ["--lr-plus"] if options.lr_plus else ["--recipe", "default"]
        process = subprocess.Popen(command)
        records: list[dict] = []
        while len(records) < options.blocks and process.poll() is None:
            time.sleep(1)
            lines = Path(folder, "blocks.jsonl")
            text = lines.read_text(encoding="utf-8") if lines.is_file() else ""
            records = [
                json.loads(line) for line in text.splitlines(keepends=True) if line[-1] == "\n"
            ]
        process.kill()
        process.wait()
    if not records:
        raise SystemExit("the run ended before its first block")
    peak = records[-1]["peak_memory_bytes"]
    print(
        f"{options.nsamples} x {options.seqlen} tokens, {dtype_name(dtype)}, offload "
        f"{options.offload}{', LRQuant+' if options.lr_plus else ''}: "
        f"peak {peak / 1e9:.2f} GB, {count} streams of hidden states {streams / 1e9:.2f} GB, "
        f"difference {(peak - streams) / 1e9:.2f} GB; {records[-1]['seconds']:.0f} s a block"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data-dir")
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--lr-plus", action="store_true")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--offload", default="host")
    return parser.parse_args()


if __name__ == "__main__":
    main()
