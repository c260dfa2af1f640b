"""Every format, and the one that a run is written in."""

from __future__ import annotations

from functools import cache

from lrquant.config.config import Config
from lrquant.config.declarations import declarations
from lrquant.errors import LRQuantError
from lrquant.export.format import Format
from lrquant.export.targets import chosen_for_target, loading_refusal, mended, tower_refusal

DEFAULT = "compressed-tensors"


@cache
def formats() -> dict[str, Format]:
    """Every format by name: those in this folder, and those that other packages declare."""
    return {form.name: form for form in declarations("formats", "lrquant.export", "FORMAT", Format)}


def choose_format(config: Config) -> Format:
    """The format that the settings name, or the first that holds what they learn.

    With a `target` that is one which the target loads, `DEFAULT` before others; without, `DEFAULT`.
    """
    known = formats()
    if config.target is not None and config.format is None:
        return chosen_for_target(config, known, DEFAULT)
    name = config.format or DEFAULT
    if name not in known:
        raise LRQuantError(f"--format {name}: use one of {', '.join(sorted(known))}")
    reason = known[name].refusal(config) or tower_refusal(known[name], config)
    if reason is not None:
        other = "" if config.format else "; or --format dequantized"
        raise LRQuantError(f"--format {name}: {reason}{other}")
    if config.target is not None:
        reason = loading_refusal(known[name], config)
        if reason is not None:
            mend = mended(config, [known[name]]) or "leave --format or --target out"
            raise LRQuantError(f"--format {name} with --target {config.target}: {reason}; {mend}")
    return known[name]
