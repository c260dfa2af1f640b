"""Whether two runs are the same: of one model, scheme, method and data."""

from __future__ import annotations

import hashlib
import json
from typing import Any

_WORDS = ("calibration", "format")  # for people, and what holds for the files


def digest(identity: dict[str, Any]) -> str:
    """One value that differs between runs that must not be mixed."""
    values = {key: value for key, value in identity.items() if key not in _WORDS}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def difference(own: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """What of a run's `own` identity is not as `wanted`, in words; None if nothing is.

    Where `wanted` names no data, it may be a part of an identity.
    """
    run, command = _flat(own), _flat(wanted)
    whole = "data set" in command
    for key in (*command, *(key for key in run if whole and key not in command)):
        if key in _WORDS or run.get(key) == command.get(key):
            continue
        if key.startswith("data ") and run.get("calibration") != command.get("calibration"):
            key = "calibration"
        return f"its {key} differs: the run has {run.get(key)!r}, this command {command.get(key)!r}"
    return None


def _flat(identity: dict[str, Any]) -> dict[str, Any]:
    """{"data": {"set": x}} -> {"data set": x}."""
    flat: dict[str, Any] = {}
    for key, value in identity.items():
        parts = value.items() if isinstance(value, dict) else ()
        flat.update({f"{key} {part}": inner for part, inner in parts} or {key: value})
    return flat
