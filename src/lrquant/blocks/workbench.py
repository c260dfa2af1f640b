"""A model on a device: how its blocks are viewed, run and streamed."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import psutil
import torch
from torch import Tensor

from lrquant.blocks.inputs import BlockInputs
from lrquant.blocks.plan import FULL_PRECISION, BlockPlan, Plan, plan_block
from lrquant.blocks.runner import BlockRunner, Observer
from lrquant.blocks.streams import Stream
from lrquant.blocks.view import BlockView
from lrquant.config.groups import Computing
from lrquant.errors import LRQuantError
from lrquant.model.arithmetic import prepare_repeatable, repeatable
from lrquant.model.device import choose_device, choose_precision, free_memory
from lrquant.model.model import Model
from lrquant.runs.folder import RunFolder

WeightedObserver = Callable[[str, Tensor, Tensor | None], None]
RoutingObserver = Callable[[Tensor | None, str, Tensor], None]


@dataclass(frozen=True)
class Workbench:
    """A part of a model on a device: how its blocks are viewed, run and streamed.

    `plan` says on which grids its matrices lie and what is learned of them, `compiled` whether
    quantizers are, `captured` whether steps of learning are replayed as CUDA graphs,
    `deterministic` whether learning on CUDA gives the same bytes each time,
    `by_expert` whether experts' weights are made one by one, while a block computes.
    """

    model: Model
    device: torch.device
    dtype: torch.dtype
    offload: str
    scratch: Path | None = None
    plan: Plan = FULL_PRECISION
    compiled: bool = False
    captured: bool = False
    deterministic: bool = False
    by_expert: bool = False

    @property
    def tower(self) -> Workbench | None:
        """The same for the model's vision tower."""
        tower = self.model.tower
        return None if tower is None else replace(self, model=tower, plan=self.plan.tower)

    @property
    def full_precision(self) -> Workbench:
        """The same with nothing quantised."""
        return replace(self, plan=FULL_PRECISION)

    @property
    def nearest(self) -> Workbench:
        """The same with nothing learned: weights are rounded to nearest."""
        return replace(self, plan=self.plan.unlearned)

    def learning(self) -> AbstractContextManager[None]:
        """How torch computes while something is learned."""
        return repeatable(self.device) if self.deterministic else nullcontext()

    def stored(self, index: int) -> dict[str, Tensor]:
        """Block `index`'s own tensors, read now, on the device; the next one is read ahead.

        Weights whose inputs the plan multiplies by Hadamard matrices are multiplied by the same.
        """
        tensors = self.model.block_tensors(index, self.device)
        self.model.read_ahead(index + 1)
        return self._plan_of(index).rotate(tensors) if self.plan.schemes.hadamard else tensors

    def view(self, index: int, stored: dict[str, Tensor]) -> BlockView:
        """Block `index`, whose tensors are `stored`, under the plan."""
        plan = self._plan_of(index)
        ingredients, scale_dtype = self.plan.ingredients, self.plan.scale_dtype
        rest = self.dtype, scale_dtype, self.compiled, self.by_expert
        return BlockView(stored, plan, ingredients, *rest)

    def _plan_of(self, index: int) -> BlockPlan:
        return plan_block(self.model, index, self.plan.schemes)

    def runner(self, index: int, view: BlockView, observer: Observer | None = None) -> BlockRunner:
        """What runs block `index` with a view's tensors."""
        return BlockRunner(
            self.model.blocks[index],
            view.plan.inputs,
            view.plan.attention,
            self.dtype,
            view.shifted_norms,
            observer,
            self.model.architecture.own_attention,
            self.compiled,
            self.model.residuals,
            self._plan_of(index).rotated if self.plan.schemes.hadamard else (),
            view.plan.attention_scheme.qk_hadamard,
        )

    def streams(self, entry: BlockInputs, count: int) -> list[Stream]:
        """`count` empty streams for the samples of `entry`, where they fit."""
        rows, hidden = entry.shape
        storage = self.storage(count * rows * hidden * self.dtype.itemsize)
        folder = self.scratch if self.scratch is not None and self.scratch.is_dir() else None
        return [Stream(entry.shape, self.dtype, self.device, storage, folder) for _ in range(count)]

    def home(self, needed: int, before: int = 0) -> torch.device:
        """Where `needed` bytes of blocks and states live that are tuned, between their uses.

        That is the device, or the host, where hidden states on disk have theirs too.
        """
        on_device = self.storage(needed, before) == "device"
        return self.device if on_device else torch.device("cpu")

    def storage(self, needed: int, before: int = 0) -> str:
        """Where `needed` bytes of hidden states live: "device", "host" or "disk".

        A device will have had to hold so many bytes `before`.
        """
        if self.offload != "auto":
            return self.offload
        if self.device.type == "cuda" and needed < 0.5 * (free_memory(self.device) - before):
            return "device"
        return "host" if needed < 0.7 * psutil.virtual_memory().available else "disk"


def make_workbench(
    model: Model, plan: Plan, computing: Computing, scratch: Path | None = None
) -> Workbench:
    """A model where it is to compute; hidden states on disk live in the folder `scratch`."""
    device = choose_device(computing.device)
    if computing.cuda_graphs and device.type != "cuda":
        raise LRQuantError(
            f"--cuda-graphs: this computes on {device}, which has none; leave it out"
        )
    dtype = choose_precision(computing.precision, device)
    deterministic = computing.deterministic and model.repeatable
    if deterministic:
        prepare_repeatable(device)
    rest = computing.offload, scratch, plan
    by_expert = computing.expert_group > 0
    return Workbench(
        *(model, device, dtype, *rest),
        captured=computing.cuda_graphs,
        deterministic=deterministic,
        by_expert=by_expert,
    )


def shape_view(model: Model, index: int, plan: Plan) -> BlockView:
    """Block `index` under a plan on the meta device: shapes without weights."""
    stored = {name: tensor.data for name, tensor in model.blocks[index].state_dict().items()}
    block = plan_block(model, index, plan.schemes)
    return BlockView(stored, block, plan.ingredients, torch.float32, plan.scale_dtype)


def begin_peak(device: torch.device) -> None:
    """Let the peak memory of a CUDA device begin here; that of a process on a CPU has no end."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Largest memory so far: of the CUDA device, or of this process on a CPU, in bytes.

    On a CPU all that the process did before counts; `ru_maxrss` is in KiB, on macOS in bytes.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def learned_view(workbench: Workbench, folder: RunFolder, index: int) -> BlockView:
    """Block `index` with the parameters that a run learned."""
    return loaded_view(workbench, index, folder.learned)


def loaded_view(
    workbench: Workbench, index: int, load: Callable[[int], dict[str, Tensor]]
) -> BlockView:
    """Block `index` with the learned parameters that `load` has of it."""
    view = workbench.view(index, workbench.stored(index))
    view.load(load(index))
    return view


@torch.no_grad()
def advance_full_precision(
    workbench: Workbench,
    index: int,
    stored: dict[str, Tensor],
    entry: BlockInputs,
    stream: Stream,
    into: Stream,
    observer: WeightedObserver | None = None,
    router: RoutingObserver | None = None,
) -> None:
    """Send `stream` through one full-precision block, to `into` (which may be `stream` itself).

    `observer` is told of each linear its full name, its inputs, and its tokens' weights; of each
    expert what it would read of every token.  `router` is told of each module of experts its name
    in the block, each token's experts (tokens, chosen) and its tokens' weights.
    """
    view = workbench.full_precision.view(index, stored)
    tensors = view.tensors()
    prefix = workbench.model.block_name(index) + "."
    with workbench.runner(index, view) as runner:
        runner.all_experts = observer is not None
        for number, batch in enumerate(entry.batches):
            weights = entry.weights(number)
            if router is not None:
                runner.router = partial(router, weights)
            if observer is not None:
                runner.observer = lambda name, values, weights=weights: observer(
                    prefix + name, values, weights
                )
            handed = stream.handed_on(batch)
            arguments = entry.arguments(number, index, handed)
            output = runner(tensors, stream.read(batch, index), arguments)
            into.hand_on(batch, handed, stream)
            into.write(batch, output)
