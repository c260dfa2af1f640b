"""The sameness of two runs: whether they are of one model, scheme, method and data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

# For people, what holds for the files, what text was read, of which the data's hash decides, and
# where a run was begun, which may go on elsewhere.
_WORDS = ("calibration", "texts", "format", "begun_on")


def digest(identity: Mapping[str, object]) -> str:
    """One value that differs between runs that must not be mixed."""
    values = {key: value for key, value in identity.items() if key not in _WORDS}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def difference(own: Mapping[str, object], wanted: Mapping[str, object]) -> str | None:
    """What of a run's `own` identity is not as `wanted`, in words; None if nothing is.

    Where `wanted` names no data, it may be less than a whole identity.
    """
    run, command = _flat(own), _flat(wanted)
    whole = "data set" in command
    for key in (*command, *(key for key in run if whole and key not in command)):
        if key in _WORDS or run.get(key) == command.get(key):
            continue
        if key.startswith("data ") and run.get("calibration") != command.get("calibration"):
            key = "calibration"
        return (
            f"its {key} differs: the run has {_said(run, key)}, this command {_said(command, key)}"
        )
    return None


def _said(values: Mapping[str, object], key: str) -> str:
    """A value for an error's line; what is not learned has no settings."""
    return repr(values[key]) if key in values else "nothing"


def _flat(identity: Mapping[str, object]) -> dict[str, object]:
    """{"data": {"set": x}} -> {"data set": x}."""
    flat: dict[str, object] = {}
    for key, value in identity.items():
        pairs = value.items() if isinstance(value, dict) and key not in _WORDS else ()
        flat.update({f"{key} {name}": inner for name, inner in pairs} or {key: value})
    return flat
