"""Families by model type, and at which sites scales move in their blocks."""

from __future__ import annotations

from transformers import CONFIG_MAPPING, PretrainedConfig

from lrquant.architectures import Architecture, architectures
from lrquant.architectures.depth import DEPTHS
from lrquant.config.choices import KINDS
from lrquant.measures.rows import table


def families_text() -> str:
    """A row a model type; a line for each that is refused in its usual form."""
    families = sorted(architectures().items())
    rows = [[kind, family.name, *marks(family, kind)] for kind, family in families]
    lines = [table(["model type", "family", *KINDS], rows), ""]
    for kind, family in families:
        config = usual_config(kind)
        reason = None if config is None else family.refusal(config)
        lines += [f"{kind}: {reason}"] if reason else []
    return "\n".join(lines)


def usual_config(kind: str) -> PretrainedConfig | None:
    """The default configuration of a model type; None where transformers has none.

    A number of experts that it leaves open is 2, and blocks of kinds that it leaves open attend.
    """
    if kind not in CONFIG_MAPPING:
        return None
    config = CONFIG_MAPPING[kind]()
    for name, value in config.to_dict().items():
        if value is None and name.startswith("n_") and name.endswith("_experts"):
            setattr(config, name, 2)
        if value is None and name == "layer_types":
            setattr(config, name, ["full_attention"] * getattr(config, "num_hidden_layers", 0))
    return config


def marks(family: Architecture, kind: str) -> list[str]:
    """A mark for each kind of site: in every block, in some, in none, refused, or not known."""
    config = usual_config(kind)
    if config is None:
        return ["?"] * len(KINDS)
    if family.refusal(config) is not None:
        return ["refused"] * len(KINDS)
    part = family.part(config)
    blocks = [{site.kind for site in family.sites(part, i)} for i in range(_count(part))]
    return [_mark([kind in kinds for kinds in blocks]) for kind in KINDS]


def _count(part: PretrainedConfig) -> int:
    """How many blocks there are: configurations call that by several names."""
    depths = (getattr(part, name, None) for name in DEPTHS)
    return next(depth for depth in depths if isinstance(depth, int) and depth)


def _mark(there: list[bool]) -> str:
    return "yes" if all(there) else "some blocks" if any(there) else "–"
