"""Every family and vision tower, as it is declared, with the sites of its default configuration."""

from __future__ import annotations

from lrquant.architectures import architectures, towers
from lrquant.config.choices import KINDS
from lrquant.reports.families import marks
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
            *marks(family, kind),
            "pictures" if family.reads_pixels else WINDOWS[family.windows_begin],
        )
        for kind, family in sorted(architectures().items())
    ]
    head = ("model type", "declared in", "blocks", *map(code, KINDS), "windows of text")
    return table(head, rows)


def towers_markdown() -> str:
    """A row a model type of a tower."""
    rows = [
        (code(kind), code(f"architectures/{tower.name}.py"), *marks(tower, kind))
        for kind, tower in sorted(towers().items())
    ]
    return table(("model type", "declared in", *map(code, KINDS)), rows)
