"""Estimates of `lrquant check` for finished runs, beside what they took.

    python benchmarks/preflight.py RUN [RUN ...] [--processor-time]

Each run folder's own settings are probed on this machine; its blocks.jsonl says what learning took.
With --processor-time the probe counts seconds of its own process, so that other work on a busy
machine does not count: compare it with runs that had a core each, with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import psutil

from lrquant.blocks.plan import Plan
from lrquant.blocks.workbench import make_workbench
from lrquant.config.config import Config
from lrquant.config.groups import Computing, Learning
from lrquant.measures.rows import table
from lrquant.model.loading import load_model
from lrquant.model.model import Model
from lrquant.preflight import probe
from lrquant.preflight.estimate import estimate_memory, learning_seconds, run_bytes
from lrquant.preflight.kinds import probe_kinds
from lrquant.preflight.load import language_load
from lrquant.runs.folder import RunFolder

HEAD = [
    "run",
    "seconds: estimate",
    "run",
    "ratio",
    "peak MB: estimate",
    "run",
    "MB: estimate",
    "run",
]


def main() -> None:
    """Probe, compare, print."""
    options = _options()
    if options.processor_time:
        probe.time.perf_counter = time.process_time
    models: dict[str, Model] = {}
    rows = []
    for path in options.runs:
        folder = RunFolder.open(path)
        name = folder.config.model
        models[name] = models.get(name) or load_model(name)
        rows.append([path.name, *_compare(models[name], folder.config, folder)])
    print(table(HEAD, rows))


def _compare(model: Model, config: Config, folder: RunFolder) -> list[str]:
    plan, learning = Plan.of(config.quantizing), config.group(Learning)
    workbench = make_workbench(model, plan, config.group(Computing), Path(config.output_dir))
    load = language_load(workbench, learning, None, [config.seqlen] * config.nsamples)
    costs = probe_kinds(load)
    before = psutil.Process().memory_info().rss
    memory = estimate_memory(load, costs, before, True)
    records = folder.records()
    seconds = learning_seconds(load, costs, with_statistics=config.act_scales is not None)
    took = sum(record.seconds for record in records)
    peak = max(record.peak_memory_bytes for record in records)
    files = sum(file.stat().st_size for file in folder.path.rglob("*") if file.is_file())
    return [
        *(f"{seconds:.0f}", f"{took:.0f}", f"{seconds / took:.2f}"),
        *(f"{memory.peak / 1e6:.0f}", f"{peak / 1e6:.0f}"),
        *(f"{run_bytes(model, workbench.plan, config.report) / 1e6:.2f}", f"{files / 1e6:.2f}"),
    ]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--processor-time", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
