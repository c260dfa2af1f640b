"""The settings of an ingredient: when it is learned, and what they come to."""

from __future__ import annotations

from typing import ClassVar

from lrquant.config.choices import SettingDict
from lrquant.config.schemes import Schemes

BLOCKS = "blocks"  # the stage in which blocks are learned, one after the other


class LearnedSettings:
    """The settings of one ingredient: a frozen dataclass made of `setting`s.

    `switch` is the setting that turns it on, `tower_switch` that of a vision tower.  With `plus` it
    is a part of LRQuant+; with `by_default` it is learned, where it applies, if no switch of such
    an ingredient is given.  `afterwards` are settings that say nothing of what a run learned.
    `stage` names the stage that learns it: block learning, or one after it, of the language part.
    """

    name: ClassVar[str]
    switch: ClassVar[str]
    tower_switch: ClassVar[str | None] = None
    plus: ClassVar[bool] = False
    by_default: ClassVar[bool] = False
    afterwards: ClassVar[tuple[str, ...]] = ()
    stage: ClassVar[str] = BLOCKS

    @classmethod
    def refusal(cls, schemes: Schemes) -> str | None:
        """Why it would have no effect under these schemes, and what to give; or None."""
        return None

    @classmethod
    def applies(cls, schemes: Schemes) -> bool:
        """Whether to learn it by default under these schemes."""
        return cls.refusal(schemes) is None

    @classmethod
    def when_off(cls) -> SettingDict:
        """Settings that mean nothing where it is not learned, as they then are."""
        return {}

    def settled(self) -> SettingDict:
        """Its settings with nothing left to default; LRQuantError for what contradicts itself."""
        return dict(vars(self))
