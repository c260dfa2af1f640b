"""Every setting a user may change: those of the core and those that declarations bring; YAML."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import yaml

from lrquant.config.choices import SettingDict
from lrquant.config.core import PRESETS, Settings, defaults_of, hints_of
from lrquant.config.declarations import Declaration, declarations
from lrquant.config.groups import SETTING, Learning, MeasureSettings, Origin, Places, Quantizing
from lrquant.config.learned import BLOCKS, LearnedSettings
from lrquant.config.scheme import Scheme
from lrquant.config.schemes import Schemes
from lrquant.config.settings import (
    SPELLED_OUT,
    convert,
    read_yaml,
    refuse_empty,
    shown,
    spelled_out,
)
from lrquant.errors import LRQuantError, nearest

T = TypeVar("T")
ALSO_CALLED = {"recipe": "preset"}
Brought = tuple[str, type, object]  # a field: its name, its type, its default and its help


@cache
def ingredient_kinds() -> tuple[type[LearnedSettings], ...]:
    """Every ingredient that can be learned: of this package, then of others."""
    kinds = declarations("ingredients", "lrquant.ingredients", "INGREDIENT", type)
    return tuple(kind for kind in kinds if issubclass(kind, LearnedSettings))


@cache
def measured_settings() -> tuple[type, ...]:
    """The settings of every measure: of this package, then of others."""
    measures = declarations("measures", "lrquant.measures", "MEASURE", Declaration)
    return tuple(measure.settings for measure in measures)


def settings_afterwards() -> list[str]:
    """Names of the settings of ingredients that say nothing of what a run learned."""
    return [name for kind in ingredient_kinds() for name in kind.afterwards]


class _Config(Settings):
    """One run: the settings of `Settings`, and those of every ingredient and measure."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for kind in measured_settings():
            self.group(kind)  # which refuses values of its own

    def group(self, kind: type[T]) -> T:
        """The settings of one declaration, or of one group, which may call them otherwise."""
        names = {
            entry.name: entry.metadata.get(SETTING, entry.name)
            for entry in dataclasses.fields(kind)  # type: ignore[arg-type]
        }
        return kind(**{own: getattr(self, name) for own, name in names.items()})

    @property
    def measuring(self) -> MeasureSettings:
        """The settings of every measure."""
        return {kind: self.group(kind) for kind in measured_settings()}

    @property
    def origin(self) -> Origin:
        """What a checkpoint of this run tells of it."""
        learning, places = self.group(Learning), self.group(Places)
        settings = self.to_yaml()
        return Origin(self.net_name, learning, self.seed, settings, places, self.push_to_hub)

    @property
    def quantizing(self) -> Quantizing:
        """What is quantised, and what is learned for it, as resolved settings say."""
        tower = () if self.vision_scheme is None else self.ingredients(tower=True)
        return Quantizing(self.schemes, self.ingredients(), tower, self.save_dtype)

    def resolved(self) -> Config:
        """The same run with nothing left to default: scheme and bits agree, methods are chosen."""
        config = self.with_bits()
        if self.batch_size % self.micro_batch_size:
            raise LRQuantError(
                f"--micro_batch_size {self.micro_batch_size}: does not divide a --batch_size of "
                f"{self.batch_size}; use 1, or that"
            )
        if self.expert_group and self.window > 1:
            raise LRQuantError(
                f"--expert_group {self.expert_group} with --window {self.window}: blocks of a "
                "window are learned together, with all of their experts; use --window 1"
            )
        schemes = config.schemes.of_language
        kinds = ingredient_kinds()
        for kind in kinds:
            reason = kind.refusal(schemes) if getattr(config, kind.switch) else None
            if reason is not None:
                raise LRQuantError(f"--{kind.switch.replace('_', '-')} {reason}")
        learned: SettingDict = {kind.switch: config._learns(kind, schemes) for kind in kinds}
        anything = any(learned.values())
        if (config.two_branch or config.dynamic_weights) and not anything:
            switch = "two_branch" if config.two_branch else "dynamic_weights"
            flags = [f"--{kind.switch.replace('_', '-')}" for kind in kinds]
            raise LRQuantError(
                f"--{switch}: nothing is learned; give {', '.join(flags[:-1])} or {flags[-1]}, and "
                "epochs"
            )
        for kind in kinds:
            on = learned[kind.switch]
            learned |= config.group(kind).settled() if on else kind.when_off()
            learned[kind.switch] = on
        plus = config.lr_plus and config.epochs > 0 and anything
        return dataclasses.replace(
            config,
            **{**learned, **config._tower_switches()},
            scheme=schemes.default.name,
            net=config.net_name or None,
            two_branch=_first(config.two_branch, plus),
            dynamic_weights=_first(config.dynamic_weights, plus),
        )

    def with_bits(self) -> Config:
        """Bits, groups and symmetry as the name of the scheme says."""
        if not self.scheme:
            return self
        scheme = Scheme.parse(self.scheme)
        return dataclasses.replace(
            self,
            wbits=scheme.weight_bits,
            abits=scheme.activation_bits,
            group_size=scheme.group_size if scheme.group_size else self.group_size,
            symmetric=scheme.symmetric or self.symmetric,
            qkv_bits=scheme.qkv_bits if scheme.qkv_bits else self.qkv_bits,
            weight_grid=scheme.weight_grid if scheme.weight_grid != "int" else self.weight_grid,
            activation_group_size=scheme.activation_group_size or self.activation_group_size,
            hadamard=scheme.hadamard or self.hadamard,
            qk_hadamard=scheme.qk_hadamard or self.qk_hadamard,
        )

    def _asked(self) -> bool:
        """Whether any ingredient that is learned by default is asked for, or declined, by name."""
        defaults = [kind for kind in ingredient_kinds() if kind.by_default]
        return any(getattr(self, kind.switch) is not None for kind in defaults)

    def _learns(self, kind: type[LearnedSettings], schemes: Schemes) -> bool:
        value = getattr(self, kind.switch)
        if value is not None:
            return bool(value)
        if kind.plus:
            return self.lr_plus and self.epochs > 0 and kind.applies(schemes)
        wanted = kind.by_default and not self._asked() and self.epochs > 0
        return wanted and kind.applies(schemes)

    def _tower_switches(self) -> dict[str, bool]:
        """What is learned in the tower: as given, else as given for all, else as it applies."""
        if self.schemes.tower is None:
            return {}
        schemes = self.schemes.of_tower
        switches = {}
        for kind in ingredient_kinds():
            if kind.tower_switch is None:
                continue
            default = bool(getattr(self, kind.switch))
            if not self._asked():
                default = self.epochs > 0 and kind.applies(schemes)
            switches[kind.tower_switch] = _first(getattr(self, kind.tower_switch), default)
        return switches

    def ingredients(self, tower: bool = False) -> tuple[LearnedSettings, ...]:
        """What a resolved run learns in the language part, or in the vision tower."""
        schemes = self.schemes.of_tower if tower else self.schemes.of_language
        kinds = [kind for kind in ingredient_kinds() if self._is_on(kind, schemes, tower)]
        return tuple(kind(**self.group(kind).settled()) for kind in kinds)

    def _is_on(self, kind: type[LearnedSettings], schemes: Schemes, tower: bool) -> bool:
        if tower and kind.stage != BLOCKS:
            return False
        on = bool(getattr(self, kind.switch))
        if tower and kind.tower_switch is not None:
            on = bool(getattr(self, kind.tower_switch))
        elif tower and kind.plus:
            on = on or (self.lr_plus and self.epochs > 0)
        return on and (not tower or kind.refusal(schemes) is None)

    def to_yaml(self) -> str:
        """All settings as YAML, in the order of this file.

        Not `overwrite`: that is asked for once, and not by who repeats the settings.  Those that
        other packages bring stand there only where they say something, so that nobody needs a
        package that was not used.
        """
        asked = dataclasses.replace(self, overwrite=False)
        unused = {
            entry.name
            for kind in (*ingredient_kinds(), *measured_settings())
            if not kind.__module__.startswith("lrquant.")
            for entry in dataclasses.fields(kind)
            if getattr(self, entry.name) == entry.default
        }
        values = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(asked).items()
            if name not in unused
        }
        values["scheme_for"] = self._patterns_as_mapping()
        return yaml.safe_dump(values, sort_keys=False)

    def _patterns_as_mapping(self) -> dict[str, str]:
        """Schemes by pattern, in their order: one given twice stands where it was given last."""
        mapping: dict[str, str] = {}
        for text in self.scheme_for:
            pattern, _, name = text.rpartition("=")
            mapping.pop(pattern, None)
            mapping[pattern] = name
        return mapping

    @classmethod
    def from_yaml(cls, path: Path) -> Config:
        """Read a file that `to_yaml` or a person wrote."""
        return cls(**typed_settings(read_yaml(path), str(path)))


def _brought(kinds: Iterable[type]) -> list[Brought]:
    """The fields of these classes of settings that `Settings` lacks, each once.

    A declaration may read a setting of another, which then has the same default.
    """
    defaults = defaults_of(Settings)
    brought: list[Brought] = []
    for kind in kinds:
        hints = hints_of(kind)
        for entry in dataclasses.fields(kind):
            if entry.name not in defaults:
                own = dataclasses.field(default=entry.default, metadata=entry.metadata)
                brought.append((entry.name, hints[entry.name], own))
            elif defaults[entry.name] != entry.default:
                raise LRQuantError(
                    f"setting {entry.name} of {kind.__module__}: its default "
                    f"{shown(entry.default)} is not that of the setting of this name, "
                    f"{shown(defaults[entry.name])}; name it otherwise"
                )
            defaults.setdefault(entry.name, entry.default)
    return brought


if TYPE_CHECKING:
    Config = _Config
else:
    Config = dataclasses.make_dataclass(
        "Config",
        _brought((*ingredient_kinds(), *measured_settings())),
        bases=(_Config,),
        frozen=True,
        namespace={"__module__": __name__, "__doc__": _Config.__doc__},
    )


def quantizing_in(path: Path) -> Quantizing:
    """What the settings that a checkpoint carries quantise."""
    return Config.from_yaml(path).quantizing


@cache
def preset(name: str) -> SettingDict:
    """The values that a preset gives to settings: "paper" those of the papers, "default" none."""
    told = {e.name: e.metadata["presets"].get(name) for e in dataclasses.fields(Config)}
    return {setting: value for setting, value in told.items() if value is not None}


def names_method(settings: SettingDict) -> bool:
    """Whether settings by name say what is learned, or under which preset."""
    parts = {"preset", "lr_plus", "two_branch", "dynamic_weights"}
    named = {*parts, *(kind.switch for kind in ingredient_kinds())}
    return bool(named & settings.keys()) or settings.get("epochs") == 0


def with_preset(settings: SettingDict) -> SettingDict:
    """`settings` over the values of the preset that they name, of what the scheme has a use for."""
    values = {**preset(settings.get("preset", "default")), **settings}
    chosen = [kind for kind in ingredient_kinds() if values.get(kind.switch)]
    for kind in [kind for kind in chosen if kind.switch not in settings]:
        if not kind.applies(Config(**values).with_bits().schemes.of_language):
            del values[kind.switch]
    return values


def overridden(settings: SettingDict, by: SettingDict) -> SettingDict:
    """`settings` with those of `by` in their place; a scheme and its bits replace each other.

    A preset in `by` replaces every value that it names, `lr_plus` the settings that it stands for.
    """
    members = {e.name for e in dataclasses.fields(Config) if e.metadata["part_of"] in by}
    replaced = set().union(*map(preset, PRESETS)) if "preset" in by else set()
    settings = {name: v for name, v in settings.items() if name not in replaced | members}
    if by.get("scheme"):
        settings = {name: value for name, value in settings.items() if name not in SPELLED_OUT}
    elif settings.get("scheme") and by.keys() & SPELLED_OUT.keys():
        bits = spelled_out(Scheme.parse(settings["scheme"]))
        bits = {name: value for name, value in bits.items() if value not in (None, False)}
        settings = {**settings, **bits, "scheme": None}
    return {**settings, **by}


def typed_settings(values: SettingDict, origin: str) -> SettingDict:
    """Fields of Config by name, dashes or underscores alike, converted; `origin` is for errors."""
    hints = hints_of(Config)
    settings: SettingDict = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        name = ALSO_CALLED.get(name, name)
        if name not in hints:
            mend = nearest(name, hints) or "; install the package that declares it"
            raise LRQuantError(f"{origin}: unknown setting {shown(key)}{mend}")
        if name in settings:
            raise LRQuantError(f"{origin}: {key}: given twice, with dashes and with underscores")
        settings[name] = convert(hints[name], value, f"{origin}: {key}")
    refuse_empty(settings, defaults_of(Config), origin)
    return settings


def optional_path(value: str | None) -> Path | None:
    """A setting that names a folder or a file, or None."""
    return None if value is None else Path(value)


def _first(value: bool | None, default: bool) -> bool:
    return default if value is None else value
