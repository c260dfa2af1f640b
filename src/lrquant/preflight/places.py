"""The output places: that they can be written, hold nothing of others, and have the space."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from lrquant.config.groups import Places
from lrquant.files.whole import JsonObject, nearest_existing, require_writable
from lrquant.formats.protected import check_target
from lrquant.preflight.findings import Preflight
from lrquant.runs.claims import OWN
from lrquant.runs.folder import RunFolder

_MEND = "free some space, or use another --output_dir or --save_dir"


def check_run_folder(
    report: Preflight, places: Places, blocks: int, identity: Callable[[], JsonObject] | None
) -> int:
    """Whether the run may start or go on in its folder; how many of its `blocks` are finished.

    `identity` tells what a run that is gone on with must be, None where that cannot be told.
    """
    output = RunFolder(Path(places.output_dir))
    if places.resume is None:
        with report.checking("run folder"):
            output.require_replaceable(places.overwrite)
        return 0
    with report.checking("run folder"):
        folder = RunFolder.open(Path(places.resume))
        if folder.path.resolve() != output.path.resolve():
            output.require_replaceable(places.overwrite)
        if identity is not None:
            folder.require_same(identity())
        finished = folder.finished_blocks()
        report.add("run folder", "ok", f"{finished} of {blocks} blocks are learned")
        return finished
    return 0


def check_places(report: Preflight, places: Places, save_dir: str | None) -> None:
    """Whether the output places can be written, and hold nothing that a run would delete."""
    output = Path(places.output_dir)
    with report.checking("output_dir"):
        require_writable(output, "--output_dir")
        others = sorted({p.name for p in output.iterdir()} - OWN) if output.is_dir() else []
        if others:
            named = ", ".join(others[:3]) + (", …" if others[3:] else "")
            report.add("output_dir", "warning", f"{output} holds other files, which stay: {named}")
        else:
            report.add("output_dir", "ok", f"{output} can be written")
    if save_dir is not None:
        with report.checking("save_dir"):
            check_target(places, Path(save_dir))
            report.add("save_dir", "ok", f"{save_dir} can be written")


def check_disk(report: Preflight, output_dir: str, save_dir: str | None, streams: int) -> None:
    """Run folder, hidden states on disk and checkpoint against the space where they go."""
    needs = {Path(output_dir): (report.run_bytes or 0) + streams}
    if save_dir is not None and report.checkpoint is not None:
        needs[Path(save_dir)] = report.checkpoint.total
    by_device: dict[int, tuple[int, Path]] = {}
    for path, size in needs.items():
        place = nearest_existing(path)
        before, _ = by_device.get(place.stat().st_dev, (0, place))
        by_device[place.stat().st_dev] = before + size, place
    for size, place in by_device.values():
        report.compare("disk", size, shutil.disk_usage(place).free, f"under {place}", _MEND)
