"""Time and communication of a learning step, by how many processes share it.

    python benchmarks/scaling.py                        # SmolLM2-135M's block shape, gloo
    python benchmarks/scaling.py --ranks 1 2 4 --device cuda --hidden 4096 --intermediate 11008 \\
        --heads 32 --kv-heads 32

Each row starts torchrun on this machine, and takes the steps that `lrquant quantize` takes of one
block of random weights.  `at once` are the samples that go through the block together
(--micro-batch-size).  `ms a step` is the time between two steps, `processor ms` what the busiest
process computed of it, and `bytes sent` what each process sends in a step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from gpu.shapes import Shape, config_of
from lrquant.blocks.plan import Plan, learned_by
from lrquant.blocks.workbench import Workbench, advance_full_precision
from lrquant.config.groups import Learning
from lrquant.config.scheme import Scheme
from lrquant.config.schemes import Schemes
from lrquant.data.feeds import Feed
from lrquant.ingredients.base.statistics import ShareOfStatistics
from lrquant.learn.block_data import BlockData
from lrquant.learn.fit import learning_step, make_optimizers
from lrquant.learn.objective import Objective
from lrquant.learn.share import shared_inputs
from lrquant.measures.rows import table
from lrquant.model.device import choose_device, choose_precision
from lrquant.model.loading import from_module
from lrquant.team.processes import Processes, joined
from lrquant.team.team import Team

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
WARM = 2  # steps before the first that is timed


class Counted:
    """How many bytes this process sends of what is summed."""

    def __init__(self) -> None:
        self.sent = 0
        original = Processes.ordered_sum

        def ordered_sum(team: Processes, rows: Tensor, counts: Sequence[int]) -> Tensor:
            others, width = team.size - 1, -(-rows.shape[1] // team.size)
            self.sent += others * width * (len(rows) + 1) * rows.element_size()
            return original(team, rows, counts)

        Processes.ordered_sum = ordered_sum  # type: ignore[method-assign]


def main() -> None:
    """Start every number of processes in turn, and print a row for each."""
    options = _options()
    if options.result is not None:
        with joined() as team:
            _measure(options, team)
        return
    cells = []
    for scheme in options.schemes:
        for ranks in options.ranks:
            for at_once in (1, options.batch_size // ranks):
                cells.append(_row(scheme, ranks, at_once, options))
    head = ["scheme", "processes", "at once", "ms a step", "processor ms", "bytes sent"]
    print(
        f"hidden {options.hidden}, intermediate {options.intermediate}, {options.batch_size} "
        f"samples of {options.tokens} tokens a step, LRQuant+, {options.device}, torch "
        f"{torch.__version__}, median of {options.steps} steps"
    )
    print(table(head, cells))


def _row(scheme: str, ranks: int, at_once: int, options: argparse.Namespace) -> list[str]:
    result = Path(options.work) / f"{scheme}-{ranks}-{at_once}.json"
    result.parent.mkdir(parents=True, exist_ok=True)
    words = [*sys.argv[1:], "--result", str(result), "--scheme", scheme, "--at-once", str(at_once)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    subprocess.run([*TORCHRUN, str(ranks), __file__, *words], check=True, env=environment)
    told = json.loads(result.read_text())
    result.unlink()
    times = [f"{told[name]:.0f}" for name in ("step", "busy")]
    return [scheme, str(ranks), str(at_once), *times, f"{told['sent']:,}"]


def _measure(options: argparse.Namespace, team: Team) -> None:
    """Take the steps, and let the first process say what they took."""
    counted = Counted()
    torch.manual_seed(0)
    device = choose_device(options.device)
    sizes = options.hidden, options.intermediate, options.heads, options.kv_heads
    config = config_of(Shape("a block", *sizes, blocks=1))
    model = from_module(LlamaForCausalLM(config).to(torch.bfloat16))
    scheme = Scheme.parse(options.scheme)
    let = scheme.activation_bits < 16
    plan = Plan(Schemes(scheme), learned_by(lwc=True, let=let, rotation=True))
    bench = Workbench(model, device, choose_precision("auto", device), "device", plan=plan)
    feed = Feed.of_tokens(torch.randint(0, 256, (options.batch_size, options.tokens)))
    entry, share = shared_inputs(bench, feed, options.batch_size, options.at_once, team)
    full, quantized = bench.streams(entry, 2)
    entry.embed(full)
    quantized.copy(full)
    seen, stored = ShareOfStatistics(), bench.stored(0)
    advance_full_precision(bench, 0, stored, entry, full, full, seen.observe)
    view = bench.view(0, stored)
    view.initialize(seen.whole(share.in_order))
    data = BlockData(0, entry, quantized, (full, full), share=share)
    learning = Learning(1, dynamic_weights=True)
    optimizers = make_optimizers(view, learning.weight_decay, steps=1)
    objective = Objective(torch.ones(2, device=device), True, learning.ema_init)
    times, busy = [], []
    counted.sent = 0
    with bench.runner(0, view) as runner:
        for _ in range(WARM + options.steps):
            started, before = time.perf_counter(), time.process_time()
            learning_step(view, runner, data, 0, optimizers, objective, learning.loss)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - started)
            busy.append(time.process_time() - before)
    sent = counted.sent // len(times)
    own = [1e3 * statistics.median(each[WARM:]) for each in (times, busy)]
    members = team.each((*own, sent))
    step, most, largest = (max(values) for values in zip(*members, strict=True))
    told = {"step": step, "busy": most, "sent": largest}
    team.first(lambda: Path(options.result).write_text(json.dumps(told)))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--schemes", nargs="+", default=["W4A4", "W4A16g64"])
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--intermediate", type=int, default=1536)
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--work", default="build/scaling", help="folder of what processes say")
    for own in ("--result", "--scheme"):
        parser.add_argument(own, help=argparse.SUPPRESS)
    parser.add_argument("--at-once", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
