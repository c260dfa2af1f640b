"""How many blocks a configuration may ask for."""

from __future__ import annotations

from transformers import PretrainedConfig

from lrquant.config.settings import shown
from lrquant.errors import LRQuantError

DEPTHS = ("num_hidden_layers", "num_layers", "depth", "n_layer", "n_layers")  # names of it
_DEEPEST = 4096


def require_depth(config: PretrainedConfig) -> None:
    """Refuse a depth that no model has, which would take for ever to lay out."""
    values = config.to_dict()
    for each in (values, *(nested for nested in values.values() if isinstance(nested, dict))):
        for name in each.keys() & DEPTHS:
            depth = each[name]
            if isinstance(depth, int) and not 0 < depth <= _DEEPEST:
                raise LRQuantError(
                    f"config.json: {name} {shown(depth)}: a model has from 1 to {_DEEPEST}; "
                    "get the file again"
                )
