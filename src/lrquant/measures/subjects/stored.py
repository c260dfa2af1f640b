"""A checkpoint before it is loaded: how large it will be in memory, and where it will lie."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AutoQuantizationConfig
from transformers.quantizers.base import HfQuantizer

from lrquant.architectures import Architecture, architecture_of, find_tower
from lrquant.blocks.placement import Placement, Room, WholeBytes, fits, quiet_accelerate, spread
from lrquant.errors import LRQuantError
from lrquant.model.device import free_memory
from lrquant.model.skeleton import build_skeleton

logger = logging.getLogger("lrquant")
_NATIVE = "lrquant"
_SPREAD = ("", "compressed-tensors", _NATIVE)  # methods that compute the same bits in any place
_WEIGHTS = ("*.safetensors", "*.bin")
_MOST = 16  # times its files that a checkpoint takes: 2 bits as float32


@dataclass(frozen=True)
class Stored:
    """A checkpoint's files; `dtype` is what its floating-point tensors become, None as they are."""

    name: str
    folder: Path
    config: PretrainedConfig
    dtype: torch.dtype | None = None

    @property
    def architecture(self) -> Architecture:
        """Its family."""
        return architecture_of(self.config)

    @property
    def method(self) -> str:
        """How it is quantised, as config.json has it; empty where it is dense."""
        values = getattr(self.config, "quantization_config", None)
        return str(values.get("quant_method", "")) if isinstance(values, dict) else ""

    @cached_property
    def skeleton(self) -> PreTrainedModel:
        """The model without its weights, dense, or with the linears of the native format."""
        skeleton = build_skeleton(copy.deepcopy(self.config), self.architecture)
        if self._quantizer is not None:
            self._quantizer.preprocess_model(skeleton)
        return skeleton

    @cached_property
    def _quantizer(self) -> HfQuantizer | None:
        """That of the native format, whose weights stay integers; others become dense."""
        if self.method != _NATIVE:
            return None
        values = copy.deepcopy(self.config.quantization_config)
        quantizer: HfQuantizer = AUTO_QUANTIZER_MAPPING[_NATIVE](
            AutoQuantizationConfig.from_dict(values)
        )
        return quantizer

    @property
    def block_names(self) -> list[str]:
        """The blocks of the tower, if there is one, and of the language part by full name."""
        tower = find_tower(self.architecture, self.config)
        parts = [self.architecture] if tower is None else [tower, self.architecture]
        lists = {part.blocks: self.skeleton.get_submodule(part.blocks) for part in parts}
        return [f"{path}.{name}" for path, blocks in lists.items() for name in blocks._modules]

    @property
    def outer_names(self) -> list[str]:
        """The tensors outside the blocks; one that is tied has several names."""
        inside = tuple(f"{name}." for name in self.block_names)
        model = self.skeleton
        tensors = [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]
        return [name for name, _ in tensors if not name.startswith(inside)]

    @cached_property
    def size(self) -> WholeBytes:
        """What it takes in memory when it computes."""
        model = self.skeleton
        blocks = {
            name: self._bytes_in(model.get_submodule(name), name) for name in self.block_names
        }
        return WholeBytes(self._bytes_in(model, "") - sum(blocks.values()), blocks)

    def _bytes_in(self, module: nn.Module, path: str) -> int:
        tensors = [*module.named_parameters(path), *module.named_buffers(path)]
        return sum(self._bytes(*each) for each in tensors)

    def _bytes(self, name: str, tensor: Tensor) -> int:
        if self._quantizer is not None:
            size = self._quantizer.param_element_size(self.skeleton, name, tensor)
        elif self.dtype is not None and tensor.is_floating_point():
            size = self.dtype.itemsize
        else:
            size = tensor.itemsize
        return int(tensor.numel() * size)

    @property
    def file_bytes(self) -> int:
        """What its weights take on the disk."""
        paths = [path for pattern in _WEIGHTS for path in self.folder.glob(pattern)]
        return sum(path.stat().st_size for path in paths)

    def fits(self, device: torch.device, processes: int = 1) -> bool:
        """Whether a device has room for it, for each of a machine's processes.

        Of methods that lie on one device here what counts is their files.
        """
        if _MOST * self.file_bytes * processes <= free_memory(device):
            return True  # the skeleton need not be made
        if self.method not in _SPREAD:
            return self.file_bytes <= free_memory(device) / processes
        return fits(self.size, device, processes)

    def placement(self, device: torch.device, room: Room | None = None) -> Placement | None:
        """Where its blocks lie; None where a device has room for it, the only one or of `room`.

        Raises LRQuantError where its method has to lie on one.
        """
        if room is None and self.fits(device):
            return None
        if self.method not in _SPREAD:
            raise LRQuantError(
                f"checkpoint {self.name}: it needs {self.file_bytes / 1e9:.1f} GB on {device}, "
                f"where {free_memory(device) / 1e9:.1f} GB are free, and {self.method} has to lie "
                "on one device; use a larger one, or measure the run that it is of"
            )
        placement = spread(self.size, device, room, f"checkpoint {self.name}")
        if placement is not None:
            logger.info("checkpoint %s needs %s: %s", self.name, self.size, placement)
        return placement


@contextmanager
def spread_loading() -> Iterator[None]:
    """Loading by a device map, quietly and without values for what stays on the disk.

    transformers would draw some, and torch draws no integers.  A tensor that the files lack is
    missing in its report all the same.  compressed-tensors would wait for the processes of a team.
    """
    from compressed_tensors.offload.utils import as_single_threaded

    def mark(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            setattr(parameter, "_is_hf_initialized", True)  # noqa: B010

    handle = register_module_parameter_registration_hook(mark)
    try:
        with quiet_accelerate(), as_single_threaded():
            yield
    finally:
        handle.remove()


def make_dense(module: PreTrainedModel) -> None:
    """Unpack weights of compressed-tensors where they lie, which is else for the first forward.

    In the middle of that, hooks of the places would be taken away.
    """
    if hasattr(module, "ct_decompress_hook"):
        vars(module)["hf_quantizer"].compressor.decompress_model(module)
