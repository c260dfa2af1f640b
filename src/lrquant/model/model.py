"""A model: its skeleton, its weights as they are needed, its tokenizer and processor."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lrquant.architectures import (
    Architecture,
    architecture_of,
    find_tower,
    language_parts,
    refuse_tower,
)
from lrquant.architectures.matrix import Matrix
from lrquant.architectures.sites import Site
from lrquant.model.published import Published
from lrquant.model.reading import Processor
from lrquant.model.sources import WeightSource

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
    processor: Processor | None = None
    generation: GenerationConfig | None = None

    @property
    def config(self) -> PretrainedConfig:
        """The configuration of the part that the blocks are of."""
        return self.architecture.part(self.skeleton.config)

    @property
    def repeatable(self) -> bool:
        """Whether CUDA has repeatable kernels for what its blocks compute."""
        language = language_parts().get(self.config.model_type, self.architecture)
        return not (self.architecture.cumulative or language.cumulative)

    @property
    def hidden_size(self) -> int:
        """Channels of a residual stream."""
        # where there is an embed_dim, hidden_size is that of the output
        embedded: int | None = getattr(self.config, "embed_dim", None)
        return embedded or self.config.hidden_size

    @property
    def residuals(self) -> int:
        """How many residual streams a block takes and gives."""
        return self.architecture.residuals(self.config)

    @property
    def state_size(self) -> int:
        """Channels of the hidden states between blocks: of all residual streams, in line."""
        return self.residuals * self.hidden_size

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
        blocks = self.skeleton.get_submodule(self.architecture.blocks)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def matrices(self, index: int) -> tuple[Matrix, ...]:
        """The matrices of a block, named relative to it."""
        return self.architecture.matrices(self.config, index)

    @property
    def has_experts(self) -> bool:
        """Whether matrices of some block are experts'."""
        indices = range(len(self.blocks))
        return any(each.expert is not None for i in indices for each in self.matrices(i))

    def sites(self, index: int) -> tuple[Site, ...]:
        """The sites of a block."""
        return self.architecture.sites(self.config, index)

    def matrix_names(self) -> list[str]:
        """Full names of the matrices of all blocks."""
        return [
            f"{self.block_name(index)}.{matrix.name}"
            for index in range(len(self.blocks))
            for matrix in self.matrices(index)
        ]

    def block_name(self, index: int) -> str:
        """Full path of a block, as tensors and statistics files name it."""
        return f"{self.architecture.blocks}.{index}"

    def block_tensors(self, index: int, device: torch.device) -> dict[str, Tensor]:
        """One block's tensors in their stored dtype, named relative to the block."""
        names = self._block_names(index)
        return {name: self.source.tensor(full).to(device) for name, full in names.items()}

    def read_ahead(self, index: int) -> None:
        """Have the system begin to read a block, if there is one of that index."""
        if index < len(self.blocks):
            self.source.read_ahead(self._block_names(index).values())

    def _block_names(self, index: int) -> dict[str, str]:
        """The full names of one block's tensors, by those relative to the block."""
        prefix = self.block_name(index) + "."
        return {name: prefix + name for name in self.blocks[index].state_dict()}

    def outer_tensors(
        self, device: torch.device, dtype: torch.dtype, *, head: bool, embeddings: bool = True
    ) -> dict[str, Tensor]:
        """All tensors outside the blocks: linears in `dtype`, the rest float32.

        Without the head if `head` is False; then named relative to the base model.  Without
        `embeddings` these are one zero that stands for all, for a model whose first hidden states
        nobody looks at.
        """
        base, last = self.base, self._head
        names = [
            name
            for name in self.outer_names()
            if head or (name.startswith(base) and name.rpartition(".")[0] != last)
        ]
        tensors = {}
        for name in names:
            owner = self.skeleton.get_submodule(name.rpartition(".")[0])
            if isinstance(owner, nn.Embedding) and not embeddings:
                zero = torch.zeros((), device=device)
                tensors[name] = zero.expand(owner.weight.shape)
                continue
            kind = dtype if isinstance(owner, nn.Linear) else torch.float32
            tensor = self.source.tensor(name)
            tensors[name] = tensor.to(device, kind if tensor.is_floating_point() else None)
        return tensors if head else {name.removeprefix(base): t for name, t in tensors.items()}

    @property
    def base(self) -> str:
        """How names within the base model begin: with its path, or with nothing where it has none
        and the whole stands for it."""
        prefix = self.skeleton.base_model_prefix
        return f"{prefix}." if hasattr(self.skeleton, prefix) else ""

    @property
    def _head(self) -> str | None:
        """The path of the language head."""
        own = self.skeleton.get_output_embeddings()
        modules = self.skeleton.named_modules()
        return next((name for name, module in modules if module is own), None)

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
    def published(self) -> Published:
        """How its own files name what is in its blocks."""
        indices = range(len(self.blocks))
        return Published(self.skeleton, {self.block_name(i): self.matrices(i) for i in indices})

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
