"""Values that a setting may have, named here so that settings need nothing of what they set."""

from __future__ import annotations

from typing import Any, Literal

SettingValue = bool | int | float | str | tuple[str, ...] | None
SettingDict = dict[str, Any]  # settings by name, to be handed to Config
SettingValues = dict[str, SettingValue]  # by the name of a field of Config

Kind = Literal["norm", "value_output", "query_key", "up_down"]
KINDS: tuple[Kind, ...] = ("norm", "value_output", "query_key", "up_down")
RULES = ("auto", "always", "never")
