"""Where the blocks of a whole model lie: on one device, or over several, the host and the disk."""

from __future__ import annotations

import gc
import importlib.util
import logging
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lrquant.blocks.workbench import Workbench
from lrquant.errors import LRQuantError
from lrquant.model.device import free_memory
from lrquant.model.model import Model

Place: TypeAlias = int | str  # the number of a CUDA device, "cpu" or "disk"
Room: TypeAlias = Mapping[Place, int]  # bytes that parameters may take, of places in their order
HOST, DISK = "cpu", "disk"
_SHARE = 0.9  # of free memory, that parameters may take beside what is computed
_MAKING = 4  # times a block's bytes: what it takes to make one, or to compute one of another place

logger = logging.getLogger("lrquant")


class WholeBytes(NamedTuple):
    """Bytes of a whole model: outside its blocks, and of each block by its name, in their order."""

    outer: int
    blocks: Mapping[str, int]

    @property
    def total(self) -> int:
        """All of it."""
        return self.outer + sum(self.blocks.values())

    @property
    def least(self) -> int:
        """What the first device must have room for."""
        return self.outer + _MAKING * max(self.blocks.values())

    def __str__(self) -> str:
        return f"{self.total / 1e9:.1f} GB"


@dataclass(frozen=True)
class Placement:
    """The place of each block, by its name; all else lies on `main`, the first device.

    Blocks on the host compute on `main`, where that is another one, and those on the disk do: each
    is there for as long as it takes.  The latter are in `folder`.
    """

    main: Place
    blocks: Mapping[str, Place]
    folder: Path | None = None

    @property
    def slow(self) -> bool:
        """Whether blocks come from elsewhere in each forward, so for each token that is written."""
        return any(place == DISK or place == HOST != self.main for place in self.blocks.values())

    def device(self, module: str) -> torch.device:
        """Where a module computes, by its path: a block, one in a block, or one outside."""
        around = (place for block, place in self.blocks.items() if is_in(module, block))
        place = next(around, self.main)
        return _device(self.main if place in (HOST, DISK) else place)

    def stored(self, name: str, tensor: Tensor, block: str) -> Tensor:
        """A parameter of a block where it is to lie; one on the disk has no values here."""
        place = self.blocks[block]
        if place != DISK:
            return tensor.to(_device(place))
        from accelerate.utils import offload_state_dict

        offload_state_dict(self.folder, {name: tensor})
        return tensor.to("meta")

    def device_map(self, outer: Collection[str]) -> dict[str, Place]:
        """The place of each block, and of the tensors outside the blocks that `outer` names.

        By module, or by tensor where blocks are in the module too.
        """
        places: dict[str, Place] = {}
        for name in outer:
            owner = name.rpartition(".")[0]
            around = any(is_in(block, owner) for block in self.blocks)
            places[name if around or not owner else owner] = self.main
        return places | dict(self.blocks)

    def dispatch(self, module: PreTrainedModel, outer: Collection[str]) -> None:
        """Let each block have what it reads, and its parameters, where it computes.

        `outer` names the tensors outside the blocks.
        """
        from accelerate import dispatch_model

        whole = {type(module.get_submodule(block)).__name__ for block in self.blocks}
        with quiet_accelerate():
            dispatch_model(
                module,
                self.device_map(outer),
                main_device=self.main,
                offload_dir=self.folder,
                skip_keys=module._skip_keys_device_placement,
                preload_module_classes=sorted(whole),
            )

    def with_folder(self, above: Path | None) -> Placement:
        """The same with a folder for what is on the disk, if anything is: in `above`, if there."""
        if DISK not in self.blocks.values():
            return self
        place = above if above is not None and above.is_dir() else None
        return replace(self, folder=Path(tempfile.mkdtemp(prefix="whole-", dir=place)))

    def __str__(self) -> str:
        """How many blocks lie where, in words."""
        runs = [(place, len(list(names))) for place, names in groupby(self.blocks.values())]
        words: dict[Place, str] = {HOST: "the host", DISK: "the disk"}
        return ", ".join(
            f"{count} blocks on {words.get(place, f'CUDA device {place}')}" for place, count in runs
        )

    def end_with(self, module: PreTrainedModel) -> None:
        """Remove the folder when nobody has the module any more, or with the process."""
        weakref.finalize(module, self.remove)

    def remove(self) -> None:
        """Remove the folder, if there is one."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def is_in(path: str, place: str) -> bool:
    """Whether a module of one path is the one of another, or in it."""
    return f"{path}.".startswith(f"{place}.")


def placement_of(workbench: Workbench, room: Room | None = None) -> Placement | None:
    """Where the blocks of a whole model lie; None where all of it fits the workbench's device.

    `room` is what there is, by default `free_room`.
    """
    size = whole_bytes(workbench.model, workbench.dtype)
    placement = spread(size, workbench.device, room)
    if placement is None:
        return None
    logger.info("the whole model needs %s: %s", size, placement)
    return placement.with_folder(workbench.scratch)


def spread(
    size: WholeBytes, device: torch.device, room: Room | None = None, what: str = "the whole model"
) -> Placement | None:
    """Where blocks of these sizes lie, None where a device has room for all of `what` they are.

    `room` is what there is, by default what is free on that device, then on the other CUDA devices,
    then on the host.  Raises LRQuantError where the first device has too little for anything.
    """
    if room is None:
        if fits(size, device):
            return None
        room = free_room(device)
    main = next(iter(room))
    if size.total <= room[main]:
        return None
    if main != HOST and size.least > room[main]:
        raise LRQuantError(
            f"{what} needs {size.least / 1e9:.1f} GB on {_device(main)} at least, where "
            f"{room[main] / 1e9:.1f} GB are free; use --device cpu"
        )
    if importlib.util.find_spec("accelerate") is None:
        raise LRQuantError(
            f"{what} needs {size}, of which {room[main] / 1e9:.1f} GB fit "
            f"{_device(main)}; pip install 'lrquant[eval]', whose accelerate spreads it"
        )
    left = {**room, main: room[main] - size.least}
    return Placement(main, placed(size.blocks, left))


def fits(size: WholeBytes, device: torch.device, processes: int = 1) -> bool:
    """Whether all blocks fit a device, for each of a machine's processes that compute on it.

    On a CPU these share its memory.  What is free of this process is given back, so that another
    one may have it.
    """
    shared = processes if device.type == "cpu" else 1
    if size.total > _free(device) / shared:
        give_back(device)
    return size.total <= _free(device) / shared


def fits_device(workbench: Workbench, processes: int = 1) -> bool:
    """Whether the whole model fits the workbench's device for each of a machine's processes."""
    give_back(workbench.device)
    return fits(whole_bytes(workbench.model, workbench.dtype), workbench.device, processes)


def give_back(device: torch.device) -> None:
    """Let go of what nobody has any more."""
    gc.collect()  # modules under hooks go no other way
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _free(device: torch.device) -> float:
    """Bytes of a device, or of the host for a CPU, that parameters may take."""
    return _SHARE * free_memory(device)


def whole_bytes(model: Model, dtype: torch.dtype) -> WholeBytes:
    """As a whole model has them whose weights are in this dtype."""
    parts = [model] if model.tower is None else [model.tower, model]
    tensors = model.skeleton.state_dict()
    outer = 0
    for name in model.outer_names():
        owner = model.skeleton.get_submodule(name.rpartition(".")[0])
        size = dtype.itemsize if isinstance(owner, nn.Linear) else torch.float32.itemsize
        outer += tensors[name].numel() * size
    blocks = {
        part.block_name(index): sum(
            tensor.numel() * (dtype.itemsize if tensor.dim() > 1 else torch.float32.itemsize)
            for tensor in block.state_dict().values()
        )
        for part in parts
        for index, block in enumerate(part.blocks)
    }
    return WholeBytes(outer, blocks)


def free_room(device: torch.device) -> dict[Place, int]:
    """What may be taken: of a CUDA device, of the other ones, of the host; else of the host."""
    room: dict[Place, int] = {}
    if device.type == "cuda":
        first = torch.cuda.current_device() if device.index is None else device.index
        others = [index for index in range(torch.cuda.device_count()) if index != first]
        for index in (first, *others):
            room[index] = int(_free(_device(index)))
    room[HOST] = int(_free(_device(HOST)))
    return room


def placed(blocks: Mapping[str, int], room: Room) -> dict[str, Place]:
    """The place of each block of so many bytes, in their order, what is left over on the disk."""
    places: dict[str, Place] = {}
    order = iter((*room, DISK))
    place = next(order)
    left = room[place]
    for name, size in blocks.items():
        while place != DISK and size > left:
            place = next(order)
            left = room.get(place, 0)
        places[name] = place
        left -= size
    return places


def _device(place: Place) -> torch.device:
    return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)


@contextmanager
def quiet_accelerate() -> Iterator[None]:
    """Without its warnings: of parameters without values between passes, or beside modules."""
    noisy = logging.getLogger("accelerate.big_modeling")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The following device_map keys", UserWarning)
            yield
    finally:
        noisy.setLevel(level)
