"""Every family and vision tower, as it is declared, with the sites of its default configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from transformers import CONFIG_MAPPING, PretrainedConfig

from lrquant.architectures import Architecture, architectures, towers
from lrquant.config.choices import KINDS
from site_parts.tables import code, table

WINDOWS = {
    "stream": "one stream, as published numbers are",
    "bos": "each with BOS",
    "tokenizer": "as its tokenizer begins a text",
}


def markdown() -> str:
    """A row a model type."""
    rows = [
        (
            code(kind),
            code(f"architectures/{family.name}.py"),
            code(family.blocks),
            *_sites(family, _config(kind)),
            "pictures" if family.reads_pixels else WINDOWS[family.windows_begin],
        )
        for kind, family in sorted(architectures().items())
    ]
    head = ("model type", "declared in", "blocks", *map(code, KINDS), "windows of text")
    return table(head, rows)


def towers_markdown() -> str:
    """A row a model type of a tower."""
    rows = [
        (code(kind), code(f"architectures/{tower.name}.py"), *_sites(tower, _config(kind)))
        for kind, tower in sorted(towers().items())
    ]
    return table(("model type", "declared in", *map(code, KINDS)), rows)


def _config(kind: str) -> PretrainedConfig | None:
    """The default configuration of a model type; None where transformers has none."""
    return CONFIG_MAPPING[kind]() if kind in CONFIG_MAPPING else None


def _sites(family: Architecture, config: PretrainedConfig | None) -> Iterable[str]:
    """A mark for each kind of site: in every block, in some, in none, refused, or not known."""
    if config is None:
        return ["?"] * len(KINDS)
    if family.refusal(config) is not None:
        return ["refused"] * len(KINDS)
    part = family.part(config)
    blocks = [_kinds(family, part, index) for index in range(_count(part))]
    return [_mark([kind in kinds for kinds in blocks]) for kind in KINDS]


def _kinds(family: Architecture, part: PretrainedConfig, index: int) -> set[str]:
    return {site.kind for site in family.sites(part, index)}


def _count(part: PretrainedConfig) -> int:
    """How many blocks there are: configurations call that by several names."""
    values: Mapping[str, int] = {**part.to_dict(), **vars(part)}
    names = ("num_hidden_layers", "num_layers", "depth", "n_layer")
    return next(values[name] for name in names if values.get(name))


def _mark(there: list[bool]) -> str:
    return "yes" if all(there) else "some blocks" if any(there) else "–"
