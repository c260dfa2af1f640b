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
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TypeAlias

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


@dataclass(frozen=True)
class Placement:
    """The place of each block, by its name; all else lies on `main`, the first device.

    Blocks on the host compute on `main`, where that is another one, and those on the disk do: each
    is there for as long as it takes.  The latter are in `folder`.
    """

    main: Place
    blocks: Mapping[str, Place]
    folder: Path | None = None

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

    def dispatch(self, module: PreTrainedModel, outer: Collection[str]) -> None:
        """Let each block have what it reads, and its parameters, where it computes.

        `outer` names the tensors outside the blocks.
        """
        from accelerate import dispatch_model

        places: dict[str, Place] = {}
        for name in outer:
            owner = name.rpartition(".")[0]
            around = any(is_in(block, owner) for block in self.blocks)
            places[name if around or not owner else owner] = self.main
        places |= self.blocks
        whole = {type(module.get_submodule(block)).__name__ for block in self.blocks}
        with _quiet_accelerate():
            dispatch_model(
                module,
                places,
                main_device=self.main,
                offload_dir=self.folder,
                skip_keys=module._skip_keys_device_placement,
                preload_module_classes=sorted(whole),
            )

    def end_with(self, module: PreTrainedModel) -> None:
        """Remove the folder when nobody has the module any more, or with the process."""
        if self.folder is not None:
            weakref.finalize(module, shutil.rmtree, self.folder, ignore_errors=True)


def is_in(path: str, place: str) -> bool:
    """Whether a module of one path is the one of another, or in it."""
    return f"{path}.".startswith(f"{place}.")


def placement_of(workbench: Workbench, room: Room | None = None) -> Placement | None:
    """Where the blocks of a whole model lie; None where all of it fits the workbench's device.

    `room` is what there is, by default what is free on that device, then on the other CUDA devices,
    then on the host.
    """
    outer, blocks = whole_bytes(workbench.model, workbench.dtype)
    needed, device = outer + sum(blocks.values()), workbench.device
    if room is None:
        if needed > _free(device):
            _give_back(device)
        if needed <= _free(device):
            return None
        room = free_room(device)
    main = next(iter(room))
    if needed <= room[main]:
        return None
    kept = outer + _MAKING * max(blocks.values())
    if main != HOST and kept > room[main]:
        raise LRQuantError(
            f"the whole model needs {kept / 1e9:.1f} GB on {_device(main)} at least, where "
            f"{room[main] / 1e9:.1f} GB are free; use --device cpu"
        )
    if importlib.util.find_spec("accelerate") is None:
        raise LRQuantError(
            f"the whole model needs {needed / 1e9:.1f} GB, of which {room[main] / 1e9:.1f} GB fit "
            f"{_device(main)}; pip install 'lrquant[eval]', whose accelerate spreads it"
        )
    places = placed(blocks, {**room, main: room[main] - kept})
    logger.info("the whole model needs %.1f GB: %s", needed / 1e9, _described(places))
    if DISK not in places.values():
        return Placement(main, places)
    scratch = workbench.scratch
    above = scratch if scratch is not None and scratch.is_dir() else None
    return Placement(main, places, Path(tempfile.mkdtemp(prefix="whole-", dir=above)))


def fits_device(workbench: Workbench, processes: int = 1) -> bool:
    """Whether the whole model fits the workbench's device for each of a machine's processes.

    On a CPU they share its memory.  What is free of this process is given back, so that another one
    may have it.
    """
    _give_back(workbench.device)
    outer, blocks = whole_bytes(workbench.model, workbench.dtype)
    shared = processes if workbench.device.type == "cpu" else 1
    return outer + sum(blocks.values()) <= _free(workbench.device) / shared


def _give_back(device: torch.device) -> None:
    """Let go of what nobody has any more."""
    gc.collect()  # modules under hooks go no other way
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _free(device: torch.device) -> float:
    """Bytes of a device, or of the host for a CPU, that parameters may take."""
    return _SHARE * free_memory(device)


def whole_bytes(model: Model, dtype: torch.dtype) -> tuple[int, dict[str, int]]:
    """Bytes outside the blocks, and of each block by its name, as a whole model has them."""
    parts = [model] if model.tower is None else [model.tower, model]
    tensors = model.skeleton.state_dict()
    outer = 0
    for name in model.outer_names():
        owner = model.skeleton.get_submodule(name.rpartition(".")[0])
        size = dtype.itemsize if isinstance(owner, nn.Linear) else torch.float32.itemsize
        outer += tensors[name].numel() * size
    return outer, {
        part.block_name(index): sum(
            tensor.numel() * (dtype.itemsize if tensor.dim() > 1 else torch.float32.itemsize)
            for tensor in block.state_dict().values()
        )
        for part in parts
        for index, block in enumerate(part.blocks)
    }


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


def _described(places: Mapping[str, Place]) -> str:
    """How many blocks lie where, in words."""
    runs = [(place, len(list(names))) for place, names in groupby(places.values())]
    words: dict[Place, str] = {HOST: "the host", DISK: "the disk"}
    return ", ".join(
        f"{count} blocks on {words.get(place, f'CUDA device {place}')}" for place, count in runs
    )


@contextmanager
def _quiet_accelerate() -> Iterator[None]:
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
