"""The output places: that they can be written, hold nothing of others, and have the space."""

from __future__ import annotations

import shutil
from pathlib import Path

from lrquant.blocks.workbench import Workbench
from lrquant.data.samples import Samples
from lrquant.export.protected import check_target
from lrquant.files.whole import nearest_existing, require_writable
from lrquant.learn.identity import describe_run
from lrquant.model.model import Model
from lrquant.preflight.findings import Preflight
from lrquant.runs.claims import OWN
from lrquant.runs.folder import RunFolder

_MEND = "free some space, or use another --output_dir or --save_dir"


def check_run_folder(
    done: Preflight, model: Model, workbench: Workbench | None, calibration: Samples | None
) -> int:
    """Whether the run may start or go on in its folder; how many blocks are finished."""
    config = done.config
    if config.resume is None:
        with done.checking("run folder"):
            RunFolder(Path(config.output_dir)).require_replaceable(config)
        return 0
    with done.checking("run folder"):
        folder = RunFolder.open(Path(config.resume))
        if folder.path.resolve() != Path(config.output_dir).resolve():
            RunFolder(Path(config.output_dir)).require_replaceable(config)
        if workbench is not None and calibration is not None:
            folder.require_same(describe_run(config, model, workbench, calibration))
        finished = folder.finished_blocks()
        done.add("run folder", "ok", f"{finished} of {len(model.blocks)} blocks are learned")
        return finished
    return 0


def check_places(done: Preflight) -> None:
    """Whether the output places can be written, and hold nothing that a run would delete."""
    config = done.config
    output = Path(config.output_dir)
    with done.checking("output_dir"):
        require_writable(output, "--output_dir")
        others = sorted({p.name for p in output.iterdir()} - OWN) if output.is_dir() else []
        if others:
            named = ", ".join(others[:3]) + (", …" if others[3:] else "")
            done.add("output_dir", "warning", f"{output} holds other files, which stay: {named}")
        else:
            done.add("output_dir", "ok", f"{output} can be written")
    if config.save_dir is not None:
        with done.checking("save_dir"):
            check_target(config, Path(config.save_dir))
            done.add("save_dir", "ok", f"{config.save_dir} can be written")


def check_disk(done: Preflight, streams: int) -> None:
    """Run folder, hidden states on disk and checkpoint against the space where they go."""
    config = done.config
    needs = {Path(config.output_dir): (done.run_bytes or 0) + streams}
    if config.save_dir is not None and done.checkpoint is not None:
        needs[Path(config.save_dir)] = done.checkpoint.total
    by_device: dict[int, tuple[int, Path]] = {}
    for path, size in needs.items():
        place = nearest_existing(path)
        before, _ = by_device.get(place.stat().st_dev, (0, place))
        by_device[place.stat().st_dev] = before + size, place
    for size, place in by_device.values():
        done.compare("disk", size, shutil.disk_usage(place).free, f"under {place}", _MEND)
