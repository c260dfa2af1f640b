"""The generated parts of pages by the names that pages call them."""

from __future__ import annotations

from collections.abc import Callable

from site_parts import api, commands, families, runtimes, settings

PARTS: dict[str, Callable[[], str]] = {
    "commands": commands.markdown,
    "python": api.markdown,
    "settings": settings.markdown,
    "presets": settings.presets_markdown,
    "families": families.markdown,
    "towers": families.towers_markdown,
    "runtimes": runtimes.markdown,
}
