"""The quantised parts of a model: the language part, and a vision tower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lrquant.config.config import Config
from lrquant.config.scheme import Scheme
from lrquant.model.model import Model


@dataclass(frozen=True)
class Part:
    """Blocks of one scheme: the path of their list, and the names of a block's tensors."""

    blocks: str
    scheme: Scheme
    names: Sequence[str] = ()


def quantized_models(model: Model, config: Config) -> list[tuple[Model, Config]]:
    """The model seen from each part that has a scheme, and the settings of that part."""
    found = [(model, config)]
    if config.vision_scheme is not None and model.tower is not None:
        found.append((model.tower, config.for_tower()))
    return found
