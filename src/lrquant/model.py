"""Loading a model: skeleton, weights as they are needed, tokenizer, device, precision."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from lrquant.architectures import Architecture, architecture_of, find_tower, refuse_tower
from lrquant.errors import LRQuantError
from lrquant.reading import (
    read_config,
    read_generation,
    read_processor,
    read_tokenizer,
    reading,
)
from lrquant.settings import shown
from lrquant.sites import Site
from lrquant.sources import ModuleSource, WeightSource, open_source, resolve_model
from lrquant.sources.kinds import (
    quantized_by,
    require_floating_point,
    require_tokenizer_files,
)
from lrquant.sources.skeleton import require_floating_weights

logger = logging.getLogger("lrquant")


@dataclass(frozen=True)
class Model:
    """A model of which no weight is in memory until it is asked for.

    `skeleton` has its parameters on the meta device and real non-persistent buffers; `processor`
    makes a multimodal model's inputs, or an image classifier's.  `blocks` are those of the language
    part; of `tower`, the same model seen from its vision tower, they are the tower's.  `generation`
    is how the model generates where it says so apart from its configuration.
    """

    name: str
    skeleton: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    source: WeightSource
    architecture: Architecture
    folder: Path | None = None
    processor: Any = None
    generation: GenerationConfig | None = None

    @property
    def config(self) -> PretrainedConfig:
        """The configuration of the part that the blocks are of."""
        return self.architecture.part(self.skeleton.config)

    @property
    def hidden_size(self) -> int:
        """Channels of the hidden states between blocks."""
        embedded = getattr(
            self.config, "embed_dim", None
        )  # where hidden_size is that of the output
        return embedded or self.config.hidden_size

    @property
    def tower(self) -> Model | None:
        """The same model seen from its vision tower, if it has one that is declared."""
        tower = find_tower(self.architecture, self.skeleton.config)
        return None if tower is None else dataclasses.replace(self, architecture=tower)

    def require_tower(self) -> Model:
        """The same model seen from its vision tower; refuses a model without one."""
        tower = self.tower
        if tower is None:
            refuse_tower(self.architecture, self.skeleton.config)
        return tower

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks of the skeleton."""
        found = self.skeleton.get_submodule(self.architecture.blocks)
        assert isinstance(found, nn.ModuleList)
        return found

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of the quantised linears, relative to a block."""
        return self.architecture.linears(self.config)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites of a block."""
        return self.architecture.sites(self.config)

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

        Without the head if `head` is False; then named relative to the base model.
        """
        base = self.skeleton.base_model_prefix + "."
        names = [name for name in self.outer_names() if head or name.startswith(base)]
        tensors = {}
        for name in names:
            owner = self.skeleton.get_submodule(name.rpartition(".")[0])
            kind = dtype if isinstance(owner, nn.Linear) else torch.float32
            tensor = self.source.tensor(name)
            tensors[name] = tensor.to(device, kind if tensor.is_floating_point() else None)
        return tensors if head else {name.removeprefix(base): t for name, t in tensors.items()}

    def outer_names(self) -> list[str]:
        """Tensors outside the blocks of the language part and of the tower."""
        lists = tuple(path + "." for path in self.block_lists)
        return [name for name in self.skeleton.state_dict() if not name.startswith(lists)]

    @property
    def block_lists(self) -> tuple[str, ...]:
        """Paths of the block lists: the language part's, and the tower's if it is declared."""
        whole = architecture_of(self.skeleton.config)
        tower = find_tower(whole, self.skeleton.config)
        return (whole.blocks,) if tower is None else (whole.blocks, tower.blocks)

    @cached_property
    def tied_names(self) -> frozenset[str]:
        """Tensors that are another one of the model: the language head, where it is the embedding.

        The configuration may say so of tensors that differ: then they are not tied, as transformers
        5 loads them.
        """
        pairs = self.skeleton.get_expanded_tied_weights_keys(all_submodels=True)
        return frozenset(name for name, other in pairs.items() if self.source.alike(name, other))

    @property
    def parameters(self) -> int:
        """How many parameters there are, tied ones once."""
        return count_parameters(self.skeleton, self.tied_names)

    def fingerprint(self) -> dict[str, str | int]:
        """What tells this model from another one."""
        return {
            "model_type": self.skeleton.config.model_type,
            "blocks": len(self.blocks),
            "weights": self.source.fingerprint(),
        }


def count_parameters(module: nn.Module, tied: Collection[str]) -> int:
    """Elements of all parameters but those named, which are other ones again."""
    return sum(tensor.numel() for name, tensor in module.named_parameters() if name not in tied)


def load_model(name: str, cache_dir: Path | None = None) -> Model:
    """A local folder, hub name or GGUF file as a `Model`; everything is checked, little is read."""
    if not name:
        raise LRQuantError("no model given: use --model with a local path, hub name or GGUF file")
    files = resolve_model(name, cache_dir)
    if files.gguf_file is None:
        require_floating_point(name, files.folder)
    config = read_config(files.folder, files.gguf_file)
    architecture = architecture_of(config)
    tokenizer = None
    if not architecture.reads_pixels:
        if files.gguf_file is None:
            require_tokenizer_files(name, files.folder)
        tokenizer = read_tokenizer(files.folder, files.gguf_file)
    skeleton = build_skeleton(config, architecture)
    source = open_source(files, skeleton)
    if source.unpacked_from():
        logger.warning(
            "model %s: its weights are unpacked from %s; full precision is that of these here",
            *(name, source.unpacked_from()),
        )
    _check_linears(skeleton, architecture)
    return Model(
        name,
        skeleton,
        tokenizer,
        source,
        architecture,
        None if files.gguf_file else files.folder,
        load_processor(files.folder, architecture),
        None if files.gguf_file else read_generation(files.folder),
    )


def from_module(
    module: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    processor: Any = None,
) -> Model:
    """An in-memory transformers model; its weights are read and never changed."""
    architecture = architecture_of(module.config)
    _require_plain(module)
    skeleton = build_skeleton(module.config, architecture)
    name = module.config.name_or_path or type(module).__name__
    _check_linears(skeleton, architecture)
    if tokenizer is None:
        tokenizer = getattr(processor, "tokenizer", None)
    generation = getattr(module, "generation_config", None)
    source = ModuleSource(module)
    _require_own_weights(source, skeleton)
    return Model(name, skeleton, tokenizer, source, architecture, None, processor, generation)


def _require_plain(module: PreTrainedModel) -> None:
    """Refuse a module that is quantised."""
    where = quantized_by(module.config.to_dict())
    if where is not None:
        raise LRQuantError(
            f"{type(module).__name__} in memory: already quantised ({where}); start from the "
            "floating-point model"
        )


def _require_own_weights(source: ModuleSource, skeleton: PreTrainedModel) -> None:
    """Refuse a module whose linears are wrapped or replaced: by adapters, for example."""
    wanted = skeleton.state_dict()
    missing = sorted(wanted.keys() - source.names())
    adapters = [name for name in sorted(source.names()) if ".lora_" in name]
    if missing or adapters:
        raise LRQuantError(
            f"{source.origin}: {(adapters or ['lacks ' + missing[0]])[0]}: its linears were "
            "replaced or have adapters; merge them first (peft: merge_and_unload)"
        )
    require_floating_weights(source, wanted)


def load_processor(folder: Path, architecture: Architecture) -> Any:
    """What makes pictures into a model's inputs, or None where there is none to be had."""
    if architecture.tower is None and not architecture.reads_pixels:
        return None
    loader = AutoImageProcessor if architecture.reads_pixels else AutoProcessor
    try:
        return read_processor(folder, loader)
    except LRQuantError as error:
        logger.warning("no processor for pictures can be read: %s", error)
        return None


def build_skeleton(config: PretrainedConfig, architecture: Architecture) -> PreTrainedModel:
    """The model without weights: parameters on the meta device, computed buffers real."""
    _require_depth(config)
    with reading(f"a {config.model_type!r}", Path("config.json")), torch.device("meta"):
        skeleton = architecture.auto_class.from_config(
            config, attn_implementation="sdpa", trust_remote_code=False
        )
    _require_blocks(skeleton, architecture)
    with reading(f"a {config.model_type!r}", Path("config.json")):
        _compute_buffers(skeleton, skeleton)
    if architecture.tower is not None:
        # Now: in a first forward with stand-ins for blocks, the blocks would never get them.
        maybe_install_capturing_hooks(skeleton)
    return skeleton.eval().requires_grad_(False)


def _require_depth(config: PretrainedConfig) -> None:
    """Refuse a depth that no model has, which would take for ever to lay out."""
    values = config.to_dict()
    parts = [values, *(part for part in values.values() if isinstance(part, dict))]
    for part in parts:
        for name in _DEPTHS & part.keys():
            depth = part[name]
            if isinstance(depth, int) and not 0 < depth <= _DEEPEST:
                raise LRQuantError(
                    f"config.json: {name} {shown(depth)}: a model has from 1 to {_DEEPEST}; "
                    "get the file again"
                )


_DEPTHS = {"num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth"}
_DEEPEST = 4096
_LARGEST_BUFFERS = 2**28  # values; those of a rotary embedding are some hundred


def _require_blocks(skeleton: PreTrainedModel, architecture: Architecture) -> None:
    """Refuse a model without blocks, or with computed buffers that no memory would hold."""
    try:
        blocks = len(getattr(skeleton.get_submodule(architecture.blocks), "_modules", ()))
    except AttributeError:
        blocks = 0
    saved = skeleton.state_dict().keys()
    sizes = [b.numel() for name, b in skeleton.named_buffers() if name not in saved]
    if not blocks or sum(sizes) > _LARGEST_BUFFERS:
        what = f"computed buffers of {sum(sizes)} values" if blocks else "no blocks"
        raise LRQuantError(
            f"config.json: a {skeleton.config.model_type!r} with {what}; get the file again"
        )


def _compute_buffers(module: nn.Module, owner: PreTrainedModel) -> None:
    """Buffers that no checkpoint holds, by the model of which the module is part."""
    if module._non_persistent_buffers_set:
        module.to_empty(device="cpu", recurse=False)
        owner._init_weights(module)
    for child in module.children():
        _compute_buffers(child, child if isinstance(child, PreTrainedModel) else owner)


def _check_linears(skeleton: PreTrainedModel, architecture: Architecture) -> None:
    tower = find_tower(architecture, skeleton.config)
    for part in (architecture,) if tower is None else (architecture, tower):
        block = skeleton.get_submodule(f"{part.blocks}.0")
        present = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        declared = set(part.linears(part.part(skeleton.config)))
        if present != declared:
            odd = ", ".join(sorted(present ^ declared))
            raise LRQuantError(
                f"model family {part.name!r}: the block's linears and the declared ones "
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
