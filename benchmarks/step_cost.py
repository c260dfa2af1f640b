"""Cost of one learning step against one plain training step of the same block.

    python benchmarks/step_cost.py                      # SmolLM2-135M's block shape
    python benchmarks/step_cost.py --hidden 4096 --intermediate 11008 --heads 32 --kv-heads 32

Plain: transformers' own block with all weights as parameters in the same precision, forward, mean
squared error, backward with weight gradients.  Learning: the step that `lrquant quantize` takes,
from the view's weights to the optimizer.  Random weights; prints medians and their ratio.  On a CPU
seconds are processor time, so set OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable

import torch
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from gpu.shapes import Shape, config_of
from lrquant.blocks.inputs import BlockInputs
from lrquant.blocks.plan import Plan, learned_by
from lrquant.blocks.workbench import Workbench, advance_full_precision
from lrquant.config.groups import Learning
from lrquant.config.scheme import Scheme
from lrquant.config.schemes import Schemes
from lrquant.ingredients.base.statistics import ChannelStatistics
from lrquant.learn.block_data import BlockData
from lrquant.learn.fit import learning_step, make_optimizers
from lrquant.learn.objective import Objective
from lrquant.measures.rows import table
from lrquant.model.device import choose_device, choose_precision
from lrquant.model.loading import from_module


def main() -> None:
    """Print one row a scheme."""
    options = _options()
    torch.manual_seed(0)
    device = choose_device(options.device)
    dtype = choose_precision(options.precision, device)
    sizes = options.hidden, options.intermediate, options.heads, options.kv_heads
    config = config_of(Shape("a block", *sizes, blocks=1))
    module = LlamaForCausalLM(config).to(torch.bfloat16)
    model = from_module(module)
    bench = Workbench(model, device, dtype, "device", compiled=options.compile)
    ids = torch.randint(0, 256, (options.batch_size, options.tokens))
    entry = BlockInputs(model, ids, options.batch_size, device)
    full, quantized = bench.streams(entry, 2)
    entry.embed(full)
    quantized.copy(full)
    observed = ChannelStatistics()
    advance_full_precision(bench, 0, bench.stored(0), entry, full, full, observed.observe)
    data = BlockData(0, entry, quantized, (full,))
    two_branches = BlockData(0, entry, quantized, (full, full))

    plain = _plain_step(module, data, dtype, device)
    rows = []
    for name, let, plus in (
        *(("W4A4", True, False), ("W4A4", True, True), ("W4A4", False, False)),
        *(("W4A16", False, False), ("W4A16", False, True)),
        *(("W4A16g64", False, False), ("W4A16g64", False, True)),
    ):
        plan = Plan(Schemes(Scheme.parse(name)), learned_by(lwc=True, let=let, rotation=plus))
        seen = two_branches if plus else data
        step = _learning_step(dataclasses.replace(bench, plan=plan), seen, observed, plus)
        ours, theirs = _pair(step, plain, device, options.repeats)
        label = f"{name}, LWC{' + LET' if let else ''}{', LRQuant+' if plus else ''}"
        rows.append([label, f"{theirs:.1f}", f"{ours:.1f}", f"{ours / theirs:.2f}"])
    print(
        f"hidden {options.hidden}, intermediate {options.intermediate}, batch "
        f"{options.batch_size} x {options.tokens} tokens, {dtype}, {device} "
        f"({torch.cuda.get_device_name(device) if device.type == 'cuda' else 'CPU'}), "
        f"torch {torch.__version__}, median of {options.repeats} pairs"
    )
    print(table(["scheme", "plain ms", "learning ms", "ratio"], rows))


def _plain_step(
    module: LlamaForCausalLM, data: BlockData, dtype: torch.dtype, device: torch.device
) -> Callable[[], None]:
    block = module.model.layers[0].to(device, dtype)
    batch = data.entry.batches[0]
    inputs, targets = (s.read(batch).to(dtype) for s in (data.inputs, *data.targets))
    arguments = dict(data.entry.arguments(0, 0))
    arguments["position_embeddings"] = tuple(
        part.to(dtype) for part in arguments["position_embeddings"]
    )

    def step() -> None:
        output = block(inputs, **arguments)
        torch.nn.functional.mse_loss(output.float(), targets.float()).backward()
        block.zero_grad(set_to_none=True)

    return step


def _learning_step(
    bench: Workbench, data: BlockData, observed: ChannelStatistics, plus: bool
) -> Callable[[], None]:
    view = bench.view(0, bench.stored(0))
    view.initialize(observed)
    learning = Learning(1, 0.0, "mse+nlc", dynamic_weights=plus)
    optimizers = make_optimizers(view, learning.weight_decay, steps=1)
    ones = torch.ones(2, device=bench.device)
    objective = Objective(ones, learning.dynamic_weights, learning.ema_init)
    runner = bench.runner(0, view)

    def step() -> None:
        with runner:
            learning_step(view, runner, data, 0, optimizers, objective, learning.loss)

    return step


def _pair(
    ours: Callable[[], None], theirs: Callable[[], None], device: torch.device, repeats: int
) -> tuple[float, float]:
    """Median milliseconds of both, run in turn so that a drifting machine slows both."""
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 2):
        for step, kept in ((ours, times[0]), (theirs, times[1])):
            _synchronize(device)
            start = _clock(device)
            step()
            _synchronize(device)
            if repeat >= 2:
                kept.append((_clock(device) - start) * 1e3)
    return statistics.median(times[0]), statistics.median(times[1])


def _clock(device: torch.device) -> float:
    """Seconds: of this process alone on a CPU, where others may run beside it."""
    return time.process_time() if device.type == "cpu" else time.perf_counter()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--intermediate", type=int, default=1536)
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--compile", action="store_true", help="with compiled quantizers")
    return parser.parse_args()


if __name__ == "__main__":
    main()
