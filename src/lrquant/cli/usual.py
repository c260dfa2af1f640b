"""What `lrquant quantize` takes where nothing is said: the recipe, and where results go."""

from __future__ import annotations

import os
from pathlib import Path

from lrquant.config.choices import SettingDict, SettingValues
from lrquant.config.config import Config, names_method
from lrquant.config.settings import SPELLED_OUT
from lrquant.errors import LRQuantError

RECIPE = "fast"
IN_PLACE = ""  # `--resume` without a folder
_IN_OUTPUT_DIR = (None, IN_PLACE, "auto")
_BITS = ("scheme", "scheme_for", "vision_scheme", *SPELLED_OUT)


def with_usual_recipe(settings: SettingValues) -> SettingValues:
    """`settings` under the recipe `RECIPE`, where they name none and nothing that is learned."""
    return settings if names_method(settings) else {**settings, "preset": RECIPE}


def with_usual_places(settings: SettingValues, save: bool) -> SettingValues:
    """`settings` with a checkpoint in `./MODEL-SCHEME`, and its run beside it, in `…-run`.

    So where neither `output_dir` nor `save_dir` is named; with `save_dir` alone the run is beside
    that, with `output_dir` alone there is no checkpoint.  Without `save` there is none either.
    """
    target = settings.get("save_dir")
    if not save and target is not None:
        raise LRQuantError(f"--no-save with --save_dir {target}: give one of them")
    if not settings.get("model") or "output_dir" in settings:
        return settings
    if settings.get("resume") not in _IN_OUTPUT_DIR:
        return settings
    if target is not None:
        return {**settings, "output_dir": f"{str(target).rstrip(os.sep)}-run"}
    bits = _bits(settings)
    name = folder_name(settings, bits)
    places: SettingValues = {"output_dir": f"{name}-run"}
    if save and not bits.schemes.floating_point:
        form = {} if settings.get("target") or settings.get("format") else {"format": "auto"}
        places |= {"save_dir": name, **form}
    return {**settings, **places}


def folder_name(settings: SettingValues, bits: Config) -> str:
    """The name of a checkpoint after its model and its schemes."""
    model = Path(os.path.expanduser(str(settings["model"])))
    net = settings.get("net") or (model.resolve() if model.exists() else model).name
    parts = [str(net).removesuffix(".gguf"), bits.quantization.name]
    parts += ["mixed"] if bits.schemes.mixed else []
    parts += ["vision", bits.vision_quantization.name] if bits.vision_quantization else []
    return "-".join(parts)


def _bits(settings: SettingValues) -> Config:
    """A configuration of what settings say of bits, and nothing else."""
    values: SettingDict = {name: settings[name] for name in _BITS if name in settings}
    return Config(**values).with_bits()
