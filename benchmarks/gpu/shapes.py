"""Blocks of published models by their shapes: one block with weights that are drawn when read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from lrquant.architectures import architecture_of
from lrquant.model.model import Model
from lrquant.model.skeleton import build_skeleton
from lrquant.model.sources import WeightSource

SPREAD = 0.02


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaMA's block, and how many blocks the whole model has."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    blocks: int

    @property
    def weights(self) -> int:
        """Weights of the linears of a block."""
        kv = self.hidden * self.kv_heads // self.heads
        return self.hidden * (2 * self.hidden + 2 * kv + 3 * self.intermediate)


SEVEN = Shape("LLaMA-7B", 4096, 11008, 32, 32, 32)
EIGHT = Shape("LLaMA-3-8B", 4096, 14336, 32, 8, 32)
SEVENTY = Shape("LLaMA-3-70B", 8192, 28672, 64, 8, 80)
SMALL = Shape("small", 128, 256, 4, 2, 2)
LARGE = (SEVEN, EIGHT, SEVENTY)


class DrawnWeights(WeightSource):
    """Random weights on a device, the same at every reading; on the meta device none at all."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], device: torch.device) -> None:
        self.origin, self._shapes, self._device = "drawn", shapes, device

    def names(self) -> frozenset[str]:
        return frozenset(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> str:
        return "bfloat16"

    def fingerprint(self) -> str:
        return "drawn"

    def tensor(self, name: str) -> Tensor:
        inside = ".layers." in name
        shape, device = self._shapes[name], self._device if inside else torch.device("cpu")
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16, device=device)
        if device.type == "meta":
            return torch.empty(shape, dtype=torch.bfloat16, device=device)
        generator = torch.Generator(device).manual_seed(sorted(self._shapes).index(name))
        drawn = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
        return drawn.mul_(SPREAD) if inside else drawn


def config_of(shape: Shape, **rest: Any) -> LlamaConfig:
    """The configuration of a model of one such block, of a small vocabulary, or as `rest` is."""
    return LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        **{"num_hidden_layers": 1, "vocab_size": 256, **rest},
    )


def model_of(shape: Shape, device: torch.device, tokens: int, **rest: Any) -> Model:
    """A model of one block, or as `rest` says, whose weights are drawn on a device."""
    config = config_of(shape, max_position_embeddings=tokens, **rest)
    family = architecture_of(config)
    skeleton = build_skeleton(config, family)
    shapes = {name: tuple(each.shape) for name, each in skeleton.state_dict().items()}
    return Model(shape.name, skeleton, None, DrawnWeights(shapes, device), family)
