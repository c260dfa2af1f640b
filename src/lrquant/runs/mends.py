"""The mends of a run's files that are not as they were written, the same whoever finds them."""

from __future__ import annotations

import re

AGAIN = "go on with --resume and the run's own settings"
AFTER_BLOCKS = {  # later stages, and how each comes anew
    "adapted": "measure with --tta again",
    "tuned": "go on with --resume, which tunes again",
}
_MENDS = {
    r"config\.yaml|run\.json": f"restore it, or delete it and {AGAIN}",
    r"(tower/)?blocks\.jsonl": (
        "delete it: it is made anew from the blocks, without seconds and memory"
    ),
    r"calibration\.safetensors": "restore it, or delete it and the model writes it again",
    r"results\.json": "restore it, or delete it and measure again",
    r"(tower/)?blocks/\d{4}\.safetensors": (
        "restore it, or delete it and go on with --resume, which learns it again"
    ),
    **{
        rf"(tower/)?{stage}/[^/]+/\d{{4}}\.safetensors": f"restore it, or delete it and {again}"
        for stage, again in AFTER_BLOCKS.items()
    },
    r"(tower/)?diagnostics/\d{4}\.safetensors": (
        "restore it, or delete it: the report then says that it is missing"
    ),
}


def mend_of(name: str) -> str:
    """What mends the file of this path in a run's folder."""
    for pattern, mend in _MENDS.items():
        if re.fullmatch(pattern, name):
            return mend
    return "restore it, or move it away and what it held is learned or measured again"
