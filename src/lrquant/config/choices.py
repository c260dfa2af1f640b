"""Values that a setting may have, named here so that settings need nothing of what they set."""

from __future__ import annotations

from typing import Literal

Kind = Literal["norm", "value_output", "query_key", "up_down"]
KINDS: tuple[Kind, ...] = ("norm", "value_output", "query_key", "up_down")
RULES = ("auto", "always", "never")
SHARINGS = ("site", "linear", "none", "weight")
