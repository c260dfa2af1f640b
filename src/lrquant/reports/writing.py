"""Writing reports: report.html, report.md and report.json of a run, and one page of several."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from lrquant.errors import LRQuantError
from lrquant.files.whole import read_plain, write_whole
from lrquant.reports.compared import compared_contents, with_known_weights
from lrquant.reports.contents import run_contents
from lrquant.reports.markdown import run_markdown
from lrquant.reports.values import Contents
from lrquant.runs.folder import RunFolder

_MARK = b'<meta name="generator" content="lrquant">'  # as in templates/base.html
_START = 1000  # bytes of a page that have it


def write_report(folder: RunFolder) -> Path:
    """Write the three files into the run's folder, each whole or not at all; the page's path."""
    from lrquant.reports.page import run_page

    contents = run_contents(folder)
    written = {
        "report.json": json.dumps(contents, indent=1, allow_nan=False) + "\n",
        "report.md": run_markdown(contents),
        "report.html": run_page(contents, folder),
    }
    for name, text in written.items():
        folder.write_text(name, text)
    return folder.path / "report.html"


def write_comparison(targets: Sequence[str | Path], output: Path) -> Path:
    """Write one page with runs, checkpoints and models side by side; replaces only such a page."""
    from lrquant.reports.page import comparison_page

    _require_own_page(output)
    runs = with_known_weights([compared_contents(str(target)) for target in targets])
    write_whole(output, comparison_page(runs, run_names(runs)))
    return output


def _require_own_page(output: Path) -> None:
    if not os.path.lexists(output):
        return
    start = b""
    with suppress(OSError):
        start = read_plain(output)[:_START]
    if output.is_symlink() or _MARK not in start:
        raise LRQuantError(
            f"--output {output}: not a page that lrquant wrote, so it is not replaced; use another "
            "name"
        )


def run_names(runs: Sequence[Contents]) -> list[str]:
    """A name for each run: its folder's, with a number where several have the same."""
    folders = [contents["run"]["folder"] for contents in runs]
    counts, seen = Counter(folders), Counter[str]()
    names = []
    for folder in folders:
        seen[folder] += 1
        names.append(f"{folder} ({seen[folder]})" if counts[folder] > 1 else folder)
    return names
