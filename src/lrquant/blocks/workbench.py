"""A model on a device: how its blocks are viewed, run and streamed."""

from __future__ import annotations

import dataclasses
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from lrquant.blocks.inputs import BlockInputs
from lrquant.blocks.runner import BlockRunner, Observer
from lrquant.blocks.streams import Stream
from lrquant.blocks.view import BlockView, Method
from lrquant.config.config import Config
from lrquant.config.scheme import FLOATING_POINT, Scheme
from lrquant.model.device import choose_device, choose_precision
from lrquant.model.model import Model
from lrquant.runs.folder import RunFolder

WeightedObserver = Callable[[str, Tensor, Tensor | None], None]


@dataclass(frozen=True)
class Workbench:
    """A model on a device: how its blocks are viewed, run and streamed."""

    model: Model
    device: torch.device
    dtype: torch.dtype
    offload: str
    scratch: Path | None = None

    @property
    def tower(self) -> Workbench | None:
        """The same for the model's vision tower."""
        tower = self.model.tower
        return None if tower is None else dataclasses.replace(self, model=tower)

    def stored(self, index: int) -> dict[str, Tensor]:
        """Block `index`'s own tensors, read now, on the device."""
        return self.model.block_tensors(index, self.device)

    def view(
        self, index: int, stored: dict[str, Tensor], scheme: Scheme, method: Method
    ) -> BlockView:
        """Block `index`, whose tensors are `stored`, under a scheme and a method."""
        model = self.model
        return BlockView(stored, model.linears, model.sites, scheme, method, self.dtype)

    def runner(self, index: int, view: BlockView, observer: Observer | None = None) -> BlockRunner:
        """What runs block `index` with a view's tensors."""
        return BlockRunner(
            self.model.blocks[index],
            self.model.linears,
            view.scheme,
            self.dtype,
            view.shifted_norms,
            observer,
        )

    def streams(self, entry: BlockInputs, count: int) -> list[Stream]:
        """`count` empty streams for the samples of `entry`, where they fit."""
        rows, hidden = entry.shape
        place = self.place(count * rows * hidden * self.dtype.itemsize)
        folder = self.scratch if self.scratch is not None and self.scratch.is_dir() else None
        return [Stream(entry.shape, self.dtype, self.device, place, folder) for _ in range(count)]

    def place(self, needed: int) -> str:
        """Where `needed` bytes of hidden states live: "device", "host" or "disk"."""
        if self.offload != "auto":
            return self.offload
        if self.device.type == "cuda" and needed < 0.5 * torch.cuda.mem_get_info(self.device)[0]:
            return "device"
        return "host" if needed < 0.7 * psutil.virtual_memory().available else "disk"


def make_workbench(model: Model, config: Config) -> Workbench:
    """Device, precision and room for hidden states as the settings say."""
    device = choose_device(config.device)
    dtype = choose_precision(config.precision, device)
    scratch = Path(config.output_dir)
    return Workbench(model, device, dtype, config.offload, scratch)


def method_of(config: Config) -> Method:
    """What the settings ask to learn."""
    return Method(
        lwc=bool(config.lwc),
        let=bool(config.let),
        let_sites=config.let_sites,
        let_shift=config.let_shift,
        rotation=bool(config.rotation),
        rotate_rank=config.rotate_rank,
        rotation_sharing=config.rotation_sharing or "site",
        lwc_init=config.lwc_init,
        save_dtype=config.save_dtype,
    )


def block_shapes(model: Model, scheme: Scheme) -> BlockView:
    """Block 0 under a scheme with nothing learned, on the meta device: shapes without weights."""
    stored = {name: tensor.data for name, tensor in model.blocks[0].state_dict().items()}
    return BlockView(stored, model.linears, model.sites, scheme, Method(), torch.float32)


def peak_memory(device: torch.device) -> int:
    """Largest memory so far: of the CUDA device, or of this process on a CPU, in bytes.

    All that the process did before counts; `ru_maxrss` is in KiB, on macOS in bytes.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def learned_view(
    workbench: Workbench, config: Config, folder: RunFolder, index: int, adapted: str | None = None
) -> BlockView:
    """Block `index` with the parameters that a run learned, or `adapted` to the text so named."""
    stored = workbench.stored(index)
    view = workbench.view(index, stored, config.quantization, method_of(config))
    view.load(folder.load_block(index, adapted))
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
) -> None:
    """Send `stream` through one full-precision block, to `into` (which may be `stream` itself).

    `observer` is told of each linear its full name, its inputs, and its tokens' weights.
    """
    view = workbench.view(index, stored, FLOATING_POINT, Method())
    tensors = view.tensors()
    prefix = workbench.model.block_name(index) + "."
    with workbench.runner(index, view) as runner:
        for number, batch in enumerate(entry.batches):
            if observer is not None:
                weights = entry.weights(number)
                runner.observer = lambda name, values, weights=weights: observer(
                    prefix + name, values, weights
                )
            output = runner(tensors, stream.read(batch, index), entry.arguments(number, index))
            into.write(batch, output)
