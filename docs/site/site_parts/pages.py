"""Pages of the site as text: where they come from, generated parts, links."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator, Mapping

ELSEWHERE = {  # a page of the site: its source in the repository
    "contributing.md": "CONTRIBUTING.md",
    "changes.md": "CHANGELOG.md",
    "measurements.md": "benchmarks/README.md",
}
_PART = re.compile(r"^<!-- generated: ([a-z-]+) -->$", re.MULTILINE)
_FENCE = re.compile(r"^ *(```|~~~)")
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")
_OUTSIDE = ("http://", "https://", "mailto:")


def parts_of(markdown: str) -> list[str]:
    """Names of the parts that are generated into a page."""
    return _PART.findall(markdown)


def filled(markdown: str, parts: Mapping[str, Callable[[], str]]) -> str:
    """A page with its generated parts in the places that name them."""
    return _PART.sub(lambda match: parts[match[1]](), markdown)


def source_of(page: str) -> str:
    """Where in the repository a page of the site comes from."""
    return ELSEWHERE.get(page, f"docs/{page}")


def page_of(source: str) -> str | None:
    """The page or figure of the site that a file of the repository becomes, or None."""
    by_source = {source: page for page, source in ELSEWHERE.items()}
    inside = source.startswith("docs/") and not source.startswith("docs/site/")
    return by_source.get(source, source.removeprefix("docs/") if inside else None)


def linked(target: str, source: str) -> tuple[str, str]:
    """The file of the repository that a link in `source` leads to, and the anchor in it."""
    path, _, anchor = target.partition("#")
    place = posixpath.join(posixpath.dirname(source), path) if path else source
    return posixpath.normpath(place), anchor


def relinked(markdown: str, page: str) -> str:
    """A page whose links lead to pages of the site; those to other files keep their words alone."""

    def replaced(match: re.Match[str]) -> str:
        if match[3].startswith((*_OUTSIDE, "#")):
            return match[0]
        file, anchor = linked(match[3], source_of(page))
        place = page_of(file)
        if place is None:
            return match[2]
        place = posixpath.relpath(place, posixpath.dirname(page) or ".")
        return f"{match[1]}[{match[2]}]({place}{'#' if anchor else ''}{anchor})"

    pieces = _pieces(markdown)
    return "\n".join(text if code else _LINK.sub(replaced, text) for text, code in pieces)


def _pieces(markdown: str) -> Iterator[tuple[str, bool]]:
    """A page in pieces of whole lines, and whether each is code."""
    lines: list[str] = []
    code = False
    for line in markdown.splitlines():
        if _FENCE.match(line) and not code:
            if lines:
                yield "\n".join(lines), False
            lines, code = [line], True
        elif _FENCE.match(line):
            yield "\n".join([*lines, line]), True
            lines, code = [], False
        else:
            lines.append(line)
    if lines:
        yield "\n".join(lines), code
