"""What a caller asks for in Python, as the pipeline takes it: models, schemes, data, progress."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrquant.config.choices import SettingDict
from lrquant.config.config import Config
from lrquant.config.scheme import FLOAT_BITS, Scheme
from lrquant.data.own import OwnData, own_data
from lrquant.errors import LRQuantError
from lrquant.model.loading import from_module
from lrquant.model.model import Model
from lrquant.model.reading import Processor
from lrquant.runs.bars import BarProgress
from lrquant.runs.progress import Progress

_SCHEMES = ("scheme", "vision_scheme")


def named_model(
    model: object, tokenizer: PreTrainedTokenizerBase | None, processor: Processor | None
) -> tuple[str, Model | None]:
    """The name of a model, and the model itself if it is in memory."""
    if isinstance(model, str | Path):
        if tokenizer is not None or processor is not None:
            raise LRQuantError(
                f"model {model}: brings its own tokenizer and processor; leave yours out, or give "
                "the model in memory"
            )
        return str(model), None
    if not isinstance(model, PreTrainedModel):
        raise LRQuantError(
            f"model of type {type(model).__name__}: expected a folder, a hub name, a GGUF file or "
            "a transformers model"
        )
    name = model.config.name_or_path or type(model).__name__
    return name, from_module(model, tokenizer, processor)


def asked_settings(settings: SettingDict) -> SettingDict:
    """`settings` with each Scheme by its name; symmetric activations are a setting of the run."""
    patterns = settings.get("scheme_for")
    others = dict(patterns) if isinstance(patterns, Mapping) else {}
    named = {name: settings[name] for name in _SCHEMES if isinstance(settings.get(name), Scheme)}
    schemes = [each for each in (*named.values(), *others.values()) if isinstance(each, Scheme)]
    symmetric = {each.activation_symmetric for each in schemes if each.activation_bits < FLOAT_BITS}
    if symmetric and "activation_symmetric" in settings:
        symmetric.add(bool(settings["activation_symmetric"]))
    if len(symmetric) > 1:
        raise LRQuantError(
            "activation_symmetric: schemes of one model disagree; give all of them the same"
        )
    values: SettingDict = {name: scheme.name for name, scheme in named.items()}
    if others:
        values["scheme_for"] = {pattern: _name(scheme) for pattern, scheme in others.items()}
    values |= {"activation_symmetric": True} if symmetric == {True} else {}
    return {**settings, **values}


def _name(scheme: object) -> object:
    return scheme.name if isinstance(scheme, Scheme) else scheme


def asked_data(calibration: object, settings: SettingDict) -> tuple[OwnData | None, SettingDict]:
    """Data to calibrate on, and the settings; a name or a path is `calib_dataset`."""
    if calibration is None:
        return None, settings
    if "calib_dataset" in settings:
        raise LRQuantError("calibration and calib_dataset: give one of them")
    if isinstance(calibration, str | Path):
        return None, {**settings, "calib_dataset": str(calibration)}
    most, column = settings.get("nsamples", Config.nsamples), settings.get("text_column")
    return own_data(
        calibration, most if isinstance(most, int) else Config.nsamples, column
    ), settings


def shown_progress(progress: Progress | bool | None) -> Progress:
    """Bars on standard error in a terminal, and in a notebook that has widgets; with False none."""
    if isinstance(progress, Progress):
        return progress
    console = Console(stderr=True)
    without_widgets = console.is_jupyter and find_spec("ipywidgets") is None
    return Progress() if progress is False or without_widgets else BarProgress(console)
