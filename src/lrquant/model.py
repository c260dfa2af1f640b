"""Loading a model: skeleton, weights as they are needed, tokenizer, device, precision."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lrquant.architectures import Architecture, architecture_of
from lrquant.errors import LRQuantError
from lrquant.sources import ModuleSource, WeightSource, open_source, resolve_model


@dataclass(frozen=True)
class Model:
    """A causal language model of which no weight is in memory until it is asked for.

    `skeleton` has its parameters on the meta device and real non-persistent buffers.
    """

    name: str
    skeleton: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    source: WeightSource
    architecture: Architecture
    folder: Path | None = None

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks of the skeleton."""
        found = self.skeleton.get_submodule(self.architecture.blocks)
        assert isinstance(found, nn.ModuleList)
        return found

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of the quantised linears, relative to a block."""
        return self.architecture.linears(self.skeleton.config)

    def block_name(self, index: int) -> str:
        """Full path of a block, as tensors and statistics files name it."""
        return f"{self.architecture.blocks}.{index}"

    def block_tensors(self, index: int, device: torch.device) -> dict[str, Tensor]:
        """One block's tensors in their stored dtype, named relative to the block."""
        prefix = self.block_name(index) + "."
        names = self.blocks[index].state_dict().keys()
        return {name: self.source.tensor(prefix + name).to(device) for name in names}

    def outer_tensors(
        self, device: torch.device, dtype: torch.dtype, *, head: bool
    ) -> dict[str, Tensor]:
        """All tensors outside the blocks: linears in `dtype`, the rest float32.

        Without the language head if `head` is False; then named relative to the base model.
        """
        prefix = self.architecture.blocks + "."
        base = self.skeleton.base_model_prefix + "."
        names = [
            name
            for name in self.skeleton.state_dict()
            if not name.startswith(prefix) and (head or name.startswith(base))
        ]
        tensors = {}
        for name in names:
            owner = self.skeleton.get_submodule(name.rpartition(".")[0])
            kind = dtype if isinstance(owner, nn.Linear) else torch.float32
            tensors[name] = self.source.tensor(name).to(device, kind)
        return tensors if head else {name.removeprefix(base): t for name, t in tensors.items()}

    def fingerprint(self) -> dict[str, str | int]:
        """What tells this model from another one."""
        return {
            "model_type": self.skeleton.config.model_type,
            "blocks": len(self.blocks),
            "weights": self.source.fingerprint(),
        }


def load_model(name: str, cache_dir: Path | None = None) -> Model:
    """A local folder, hub name or GGUF file as a `Model`; everything is checked, little is read."""
    if not name:
        raise LRQuantError("no model given: use --model with a local path, hub name or GGUF file")
    files = resolve_model(name, cache_dir)
    extra = {"gguf_file": files.gguf_file} if files.gguf_file else {}
    try:
        config = AutoConfig.from_pretrained(files.folder, **extra)
        tokenizer = AutoTokenizer.from_pretrained(files.folder, **extra)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise LRQuantError(
            f"model {name}: config or tokenizer cannot be read ({reason}); download it again"
        ) from error
    architecture = architecture_of(config)
    if getattr(config, "quantization_config", None) is not None:
        raise LRQuantError(f"model {name}: already quantised; start from the floating-point model")
    skeleton = build_skeleton(config)
    source = open_source(files, skeleton)
    _check_linears(skeleton, architecture)
    return Model(name, skeleton, tokenizer, source, architecture, files.folder)


def from_module(module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> Model:
    """An in-memory transformers model; its weights are read and never changed."""
    architecture = architecture_of(module.config)
    skeleton = build_skeleton(module.config)
    name = module.config.name_or_path or type(module).__name__
    _check_linears(skeleton, architecture)
    return Model(name, skeleton, tokenizer, ModuleSource(module), architecture)


def build_skeleton(config) -> PreTrainedModel:
    """The model without weights: parameters on the meta device, computed buffers real."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    for module in skeleton.modules():
        if module._non_persistent_buffers_set:
            module.to_empty(device="cpu", recurse=False)
            skeleton._init_weights(module)
    return skeleton.eval().requires_grad_(False)


def _check_linears(skeleton: PreTrainedModel, architecture: Architecture) -> None:
    block = skeleton.get_submodule(f"{architecture.blocks}.0")
    present = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    declared = set(architecture.linears(skeleton.config))
    if present != declared:
        odd = ", ".join(sorted(present ^ declared))
        raise LRQuantError(
            f"model family {architecture.name!r}: the block's linears and the declared ones "
            f"differ ({odd}); the declaration does not fit this model"
        )


def choose_device(name: str) -> torch.device:
    """The device that "auto", "cpu", "cuda" or "cuda:N" means on this machine."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise LRQuantError(f"device {name!r}: use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise LRQuantError(f"device {name!r}: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise LRQuantError(f"device {name!r}: torch sees {count} CUDA devices; use --device cpu")
    return device


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products: bfloat16 where the hardware multiplies it fast."""
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32
