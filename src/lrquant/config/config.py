"""Every setting a user may change, with its default, unit and source; to and from YAML."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from lrquant.config.choices import KINDS, RULES, SHARINGS
from lrquant.config.presets import PRESETS
from lrquant.config.scheme import Scheme
from lrquant.config.settings import convert, read_yaml, refuse_empty, shown, spelled_out
from lrquant.errors import LRQuantError

TARGETS = ("vllm", "vllm-cpu", "transformers", "native")
PUBLISHED_PERPLEXITY_SETS = ("wikitext2", "ptb", "c4", "ptb-new", "c4-new")


def _setting(default: Any, text: str, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class Config:
    """One run.  Defaults are those of the published tool where it has the setting."""

    model: str = _setting("", "local folder, hub name or GGUF file")
    preset: str = _setting(
        "default", "values of all settings not given: ours, or those of the papers", tuple(PRESETS)
    )
    net: str | None = _setting(None, "short name of the model (default: last part of --model)")

    scheme: str | None = _setting(None, "bits and groups in short, e.g. W4A4, W4A16g128")
    wbits: int = _setting(4, "weight bits, 2 to 8, or 16 for floating point")
    abits: int = _setting(4, "activation bits, 2 to 8, or 16 for floating point")
    qkv_bits: int | None = _setting(None, "bits of attention's Q, K and V (default: --abits)")
    group_size: int | None = _setting(None, "input columns sharing a scale (default: all)")
    symmetric: bool = _setting(False, "symmetric weight grid without zero points")
    activation_symmetric: bool = _setting(False, "symmetric activation grid")

    lwc: bool | None = _setting(None, "learn weight clipping (default: with --let, if neither set)")
    let: bool | None = _setting(None, "learn equivalent transformations")
    let_sites: tuple[str, ...] = _setting(
        ("norm", "value_output", "up_down"), f"site kinds to use, of {', '.join(KINDS)}"
    )
    let_shift: str = _setting(
        "auto",
        "learn shifts: where every module has a bias (auto), everywhere or nowhere",
        ("auto", "always", "never"),
    )
    lr_plus: bool = _setting(False, "LRQuant+: rotation vectors, two branches, dynamic weights")
    rotation: bool | None = _setting(None, "learn rotation vectors (default: with --lr-plus)")
    rotate_rank: int = _setting(1, "rank of the rotation vectors")
    rotation_sharing: str | None = _setting(
        None,
        "input side: one a norm, folded into it (site, the default), one a linear, none, or the "
        "published dense factor on the weight (weight, the default above rank 1)",
        SHARINGS,
    )
    two_branch: bool | None = _setting(
        None, "compare with the full-precision block on the quantised input too (with --lr-plus)"
    )
    dynamic_weights: bool | None = _setting(
        None, "weigh loss terms by their running means (default: with --lr-plus)"
    )
    ema_init: str = _setting(
        "first", "running means start at the first loss, or at one as published", ("first", "one")
    )
    loss: str = _setting("mse+nlc", "block loss (LRQuant: mse+nlc)", ("mse+nlc", "mse", "nlc"))
    epochs: int = _setting(10, "passes over the samples a block; 0 learns nothing")
    keep_best: bool = _setting(True, "keep the epoch with the lowest loss over all samples")
    lwc_lr: float = _setting(1e-2, "learning rate of the clipping")
    let_lr: float = _setting(5e-3, "learning rate of scales and shifts (ACL paper: 1e-3)")
    rotation_lr: float = _setting(1e-2, "learning rate of the rotation vectors")
    lwc_init: float | None = _setting(
        None, "logit that the clipping starts at (papers: 4); default: searched for each group"
    )
    wd: float = _setting(0.0, "weight decay")
    batch_size: int = _setting(1, "samples a step")

    calib_dataset: str = _setting(
        "wikitext2", "wikitext2, c4, ptb, pile, mix, a set in --data-dir, or a text file"
    )
    nsamples: int = _setting(128, "calibration samples")
    seqlen: int = _setting(2048, "tokens a sample, and a perplexity window")
    text_column: str | None = _setting(
        None, "column of the text in .jsonl, .json and .parquet files (default: as its rows say)"
    )
    bos: str = _setting(
        "auto",
        "BOS before each window of text: as the model was trained, but by the field's convention "
        "for families whose published numbers have none (auto)",
        RULES,
    )
    vision_scheme: str | None = _setting(
        None, "quantise the vision tower too, e.g. W8A8 (default: it stays in floating point)"
    )
    vision_lwc: bool | None = _setting(
        None, "learn clipping in the tower (default: --lwc if given, else as its scheme asks)"
    )
    vision_let: bool | None = _setting(
        None, "learn transformations in the tower (default: --let if given, else as it asks)"
    )
    calib_images: str | None = _setting(
        None, "calibrate on pictures too: a folder of them, or a .jsonl of conversations"
    )
    calib_image_share: float = _setting(
        0.5, "share of the calibration samples that have pictures, where there are some"
    )
    image_token_weight: float = _setting(
        1.0, "how much a picture's token counts in losses and statistics; one of text counts 1"
    )
    seed: int = _setting(2, "seed of the calibration sampling")
    data_dir: str | None = _setting(None, "folder with SET/{train,validation,test}.txt")
    cache_dir: str | None = _setting(None, "cache of hub downloads (default: the hub's own)")
    act_scales: str | None = _setting(None, "channel maxima from `lrquant stats` (.pt)")
    act_shifts: str | None = _setting(None, "channel midpoints from `lrquant stats` (.pt)")

    eval_ppl: bool = _setting(False, "perplexity on every published set that can be had")
    ppl: tuple[str, ...] = _setting((), "perplexity on these sets")
    agreement: tuple[str, ...] = _setting(
        (), "KL divergence of next-token distributions from full precision on these sets"
    )
    compare: bool | str = _setting(
        False,
        "evaluate full precision and round-to-nearest beside it, or the run, checkpoint or model "
        "that is given",
    )
    max_drop: float | None = _setting(
        None, "exit with 1 if the tasks' mean accuracy falls by more than this (0.01: one point)"
    )
    vqa: tuple[str, ...] = _setting(
        (), "visual question answering: .jsonl files of conversations with answers"
    )
    classify: str | None = _setting(
        None, "accuracy of an image classifier on a folder of pictures, one subfolder a class"
    )
    tta: bool = _setting(
        False, "test-time adaptation: measure also with blocks learned again on the test text"
    )
    tta_blocks: int = _setting(1, "how many of the last blocks are adapted")
    tta_epochs: int = _setting(5, "passes over the test text")
    tta_let_lr: float = _setting(1e-3, "learning rate of scales and shifts while adapting")
    tasks: str = _setting("", "zero-shot tasks of lm-evaluation-harness, separated by commas")
    num_fewshot: int = _setting(0, "examples in the prompt of a task, whatever the task says")
    task_batch_size: str = _setting(
        "auto", "requests of a task at once; auto: what fits on a GPU, 8 on a CPU"
    )
    limit: int = _setting(-1, "windows a set and items a task (-1: all)")

    output_dir: str = _setting("../log/", "run folder: config, log, blocks, results")
    report: bool = _setting(
        True, "measure each learned block over a few samples, and write report.html, .md and .json"
    )
    log_dir: str | None = _setting(
        None, "write losses and measures for TensorBoard here (lrquant[tensorboard])"
    )
    save_dir: str | None = _setting(None, "write the quantised model as a checkpoint here")
    format: str | None = _setting(
        None, "format of --save-dir: compressed-tensors (default), awq, dequantized"
    )
    target: str | None = _setting(
        None,
        "runtime that must be able to load the result: what it can't hold is refused before "
        "learning, and --format is chosen for it",
        TARGETS,
    )
    save_dtype: str | None = _setting(
        None,
        "dtype of a checkpoint's scales and unquantised tensors (default: the model's own)",
        ("bfloat16", "float16", "float32"),
    )
    resume: str | None = _setting(None, "go on with this run folder")
    overwrite: bool = _setting(
        False, "replace the run in --output_dir, the checkpoint in --save_dir"
    )

    device: str = _setting("auto", "auto, cpu, cuda or cuda:N")
    precision: str = _setting(
        "auto", "matrix products: bfloat16 where fast (auto)", ("auto", "bfloat16", "float32")
    )
    offload: str = _setting(
        "auto", "where hidden states live between blocks", ("auto", "device", "host", "disk")
    )

    def __post_init__(self) -> None:
        values = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        _require_types(values)
        refuse_empty(values, _defaults())
        for name, (smallest, largest) in _RANGES.items():
            if not smallest <= values[name] <= largest:
                raise LRQuantError(
                    f"{name} {shown(values[name])}: use a whole number from {smallest} to {largest}"
                )
        for name in ("lwc_lr", "let_lr", "rotation_lr", "tta_let_lr", "wd"):
            if not 0 <= values[name] <= _FASTEST:
                raise LRQuantError(f"{name} {values[name]}: use a number from 0 to {_FASTEST:g}")
        size = self.task_batch_size
        if size != "auto" and not (size.isdecimal() and 0 < int(size[:9]) <= _MANY):
            raise LRQuantError(
                f"task_batch_size {size!r}: use auto or a whole number from 1 to {_MANY}"
            )
        if not 0 < self.calib_image_share <= 1:
            raise LRQuantError(
                f"calib_image_share {self.calib_image_share}: use a share above 0, up to 1; for "
                "text alone leave --calib-images out"
            )
        if not 0 < self.image_token_weight <= _HEAVIEST:
            raise LRQuantError(
                f"image_token_weight {self.image_token_weight}: use a number above 0, up to "
                f"{_HEAVIEST:g}"
            )
        if self.vision_scheme is not None:
            Scheme.parse(self.vision_scheme)
        if self.max_drop is not None and not 0 <= self.max_drop <= 1:
            raise LRQuantError(
                f"max_drop {self.max_drop}: use a share of accuracy from 0 to 1 (0.01: one point)"
            )
        if self.limit == 0:
            raise LRQuantError("limit 0: use a whole number of at least 1, or -1 for all")
        if self.lwc_init is not None and not abs(self.lwc_init) <= _STEEPEST:
            raise LRQuantError(
                f"lwc_init {self.lwc_init}: use a logit from {-_STEEPEST} to {_STEEPEST}"
            )
        if self.tasks and not self.tasks.replace(",", " ").strip():
            raise LRQuantError(f"tasks {self.tasks!r}: names no task; leave it out for none")
        for entry in dataclasses.fields(self):
            choices = entry.metadata["choices"]
            value = getattr(self, entry.name)
            if choices and value not in choices and (value, entry.default) != (None, None):
                raise LRQuantError(f"{entry.name} {value!r}: use one of {', '.join(choices)}")
        unknown = [kind for kind in self.let_sites if kind not in KINDS]
        if unknown:
            raise LRQuantError(f"let_sites {unknown[0]!r}: use some of {', '.join(KINDS)}")

    def resolved(self) -> Config:
        """The same run with nothing left to default: scheme and bits agree, methods are chosen."""
        scheme = Scheme.parse(self.scheme) if self.scheme else None
        config = self
        if scheme is not None:
            config = dataclasses.replace(
                config,
                wbits=scheme.weight_bits,
                abits=scheme.activation_bits,
                group_size=scheme.group_size if scheme.group_size else config.group_size,
                symmetric=scheme.symmetric or config.symmetric,
                qkv_bits=scheme.qkv_bits if scheme.qkv_bits else config.qkv_bits,
            )
        scheme = config.quantization
        lwc, let = config.lwc, config.let
        config = config._with_tower_method()
        if let and scheme.floating_point:
            raise LRQuantError(
                "--let with W16A16: nothing is quantised, so scales have no effect; "
                "give --wbits or --abits below 16"
            )
        if lwc and scheme.weight_bits == 16:
            raise LRQuantError(
                "--lwc with --wbits 16: there is no weight range to clip; give --wbits below 16"
            )
        if lwc is None and let is None and config.epochs > 0:
            lwc, let = scheme.weight_bits < 16, not scheme.weight_only
        plus = config.lr_plus and config.epochs > 0
        rotation = _given_or(config.rotation, plus and scheme.weight_bits < 16)
        if (config.two_branch or config.dynamic_weights) and not (lwc or let or rotation):
            part = "two_branch" if config.two_branch else "dynamic_weights"
            raise LRQuantError(
                f"--{part}: nothing is learned; give --lwc, --let or --rotation, and epochs"
            )
        plus = plus and bool(lwc or let or rotation)
        return dataclasses.replace(
            config,
            scheme=scheme.name,
            lwc=bool(lwc),
            let=bool(let),
            net=config.net_name or None,
            rotation=rotation,
            rotate_rank=config.rotate_rank if rotation else 1,
            rotation_sharing=config._sharing(scheme) if rotation else None,
            two_branch=_given_or(config.two_branch, plus),
            dynamic_weights=_given_or(config.dynamic_weights, plus),
        )

    def _sharing(self, scheme: Scheme) -> str:
        if scheme.weight_bits == 16:
            raise LRQuantError(
                "--rotation with --wbits 16: there is no quantised weight to scale; give --wbits "
                "below 16"
            )
        if self.rotate_rank > 1 and self.rotation_sharing not in (None, "weight"):
            raise LRQuantError(
                f"--rotate_rank {self.rotate_rank} with --rotation_sharing "
                f"{self.rotation_sharing}: above rank 1 the factor is dense; use "
                "--rotation_sharing weight (no integer format holds it) or --rotate_rank 1"
            )
        return self.rotation_sharing or ("site" if self.rotate_rank == 1 else "weight")

    @property
    def quantization(self) -> Scheme:
        """The scheme that the bits spell out."""
        return Scheme(
            weight_bits=self.wbits,
            activation_bits=self.abits,
            group_size=self.group_size,
            symmetric=self.symmetric,
            activation_symmetric=self.activation_symmetric,
            qkv_bits=self.qkv_bits,
        )

    @property
    def vision_quantization(self) -> Scheme | None:
        """The scheme of the vision tower, None where it stays in floating point."""
        if self.vision_scheme is None:
            return None
        given = Scheme.parse(self.vision_scheme)
        return dataclasses.replace(given, activation_symmetric=self.activation_symmetric)

    def _with_tower_method(self) -> Config:
        """What is learned in the tower: as given, else as its scheme asks."""
        scheme = self.vision_quantization
        if scheme is None:
            return self
        given, learns = (self.lwc, self.let) != (None, None), self.epochs > 0
        lwc = bool(self.lwc) if given else learns and scheme.weight_bits < 16
        let = bool(self.let) if given else learns and not scheme.weight_only
        lwc, let = _given_or(self.vision_lwc, lwc), _given_or(self.vision_let, let)
        return dataclasses.replace(self, vision_lwc=lwc, vision_let=let)

    def for_tower(self) -> Config:
        """The same resolved run for the vision tower: its scheme and what is learned in it."""
        scheme = self.vision_quantization
        assert scheme is not None
        quantized = scheme.weight_bits < 16
        rotation = quantized and bool(self.rotation or (self.lr_plus and self.epochs > 0))
        return dataclasses.replace(
            self,
            scheme=scheme.name,
            **spelled_out(scheme),
            lwc=bool(self.vision_lwc) and quantized,
            let=bool(self.vision_let),
            rotation=rotation,
            rotation_sharing=self._sharing(scheme) if rotation else None,
            act_scales=None,
            act_shifts=None,
        )

    @property
    def net_name(self) -> str:
        """The model's short name."""
        return self.net or (Path(self.model).absolute().name if self.model else "")

    @property
    def perplexity_sets(self) -> tuple[str, ...]:
        """Sets asked for by name, or the published five; then those for agreement alone."""
        sets = self.ppl or (PUBLISHED_PERPLEXITY_SETS if self.eval_ppl else ())
        return tuple(dict.fromkeys((*sets, *self.agreement)))

    def to_yaml(self) -> str:
        """All settings as YAML, in the order of this file.

        Not `overwrite`: that is asked for once, and not by who repeats the settings.
        """
        asked = dataclasses.replace(self, overwrite=False)
        values = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(asked).items()
        }
        return yaml.safe_dump(values, sort_keys=False)

    @classmethod
    def from_yaml(cls, path: Path) -> Config:
        """Read a file that `to_yaml` or a person wrote."""
        return cls(**typed_settings(read_yaml(path), str(path)))


_MANY = 2**16
_HEAVIEST = 1e6
_FASTEST = 1e30
_STEEPEST = 80  # the sigmoid of a lower logit is nothing in float32
_RANGES = {  # beyond these no machine ends a run, or no generator takes the number
    **{"epochs": (0, 10_000), "nsamples": (1, _MANY), "batch_size": (1, _MANY)},
    **{"seqlen": (2, 2**24), "rotate_rank": (1, _MANY), "seed": (0, 2**63 - 1)},
    **{"tta_blocks": (1, 10_000), "tta_epochs": (1, 10_000), "num_fewshot": (0, 1000)},
    **{"limit": (-1, 2**31 - 1)},
}


@cache
def _hints() -> dict[str, Any]:
    return typing.get_type_hints(Config)


@cache
def _defaults() -> dict[str, Any]:
    return {entry.name: entry.default for entry in dataclasses.fields(Config)}


def _require_types(values: dict[str, Any]) -> None:
    for name, kind in _hints().items():
        value = values[name]
        if convert(kind, value, name) != value and value == value:  # nan is a number
            raise LRQuantError(f"{name}: {shown(value)} is of another kind than it takes")


def optional_path(value: str | None) -> Path | None:
    """A setting that names a place, or None."""
    return None if value is None else Path(value)


def _given_or(value: bool | None, default: bool) -> bool:
    return default if value is None else value


def typed_settings(values: dict[str, Any], origin: str) -> dict[str, Any]:
    """Fields of Config by name, dashes or underscores alike, converted; `origin` is for errors."""
    hints = _hints()
    settings: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in hints:
            raise LRQuantError(f"{origin}: unknown setting {shown(key)}")
        if name in settings:
            raise LRQuantError(f"{origin}: {key}: given twice, with dashes and with underscores")
        settings[name] = convert(hints[name], value, f"{origin}: {key}")
    refuse_empty(settings, _defaults(), origin)
    return settings
