"""The settings that no declaration brings: their defaults, units, sources and limits."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lrquant.config.choices import RULES, SettingDict
from lrquant.config.scheme import Scheme
from lrquant.config.schemes import Schemes, parse_patterns
from lrquant.config.settings import convert, refuse_empty, setting, shown
from lrquant.errors import LRQuantError, nearest

PRESETS = ("default", "fast", "balanced", "best", "paper")
TARGETS = ("vllm", "vllm-cpu", "transformers", "native")
MANY = 2**16  # beyond such limits no machine ends a run, or no generator takes the number
HEAVIEST = 1e6
FASTEST = 1e30


@dataclass(frozen=True)
class Settings:
    """One run.  Defaults are those of the published tool where it has the setting."""

    model: str = setting("", "local folder, hub name or GGUF file")
    preset: str = setting(
        "default",
        "recipe, the values of all settings not given: blocks alone (fast), tuned end to end too "
        "(balanced), on twice the text (best), as in the papers (paper), or each setting's own "
        "default (default)",
        PRESETS,
    )
    net: str | None = setting(None, "short name of the model (default: last part of --model)")

    scheme: str | None = setting(None, "bits and groups in short, e.g. W4A4, W4A16g128")
    scheme_for: tuple[str, ...] = setting(
        (),
        "another scheme for matrices by name, PATTERN=SCHEME, e.g. mlp.down_proj=W8A16 or "
        "layers.0=W8A16; 16 leaves them alone, the last that fits counts",
    )
    wbits: int = setting(4, "weight bits, 2 to 8, or 16 for floating point")
    abits: int = setting(4, "activation bits, 2 to 8, or 16 for floating point")
    qkv_bits: int | None = setting(None, "bits of attention's Q, K and V (default: --abits)")
    group_size: int | None = setting(None, "input columns sharing a scale (default: all)")
    symmetric: bool = setting(False, "symmetric weight grid without zero points")
    activation_symmetric: bool = setting(False, "symmetric activation grid")
    activation_group_size: int | None = setting(
        None, "channels of a token sharing a scale (default: all), -ag<size> in --scheme"
    )
    hadamard: bool = setting(
        False,
        "inputs of linears times a Hadamard matrix at run time, -hadamard in --scheme; for "
        "some: --scheme-for mlp.down_proj=W4A4-hadamard",
    )
    qk_hadamard: bool = setting(
        False,
        "queries and keys times a Hadamard matrix at run time, after their rotary embedding, -r3 "
        "in --scheme",
    )
    weight_grid: str = setting("int", "kind of grid of the weights, or at the end of --scheme")

    lr_plus: bool = setting(
        False,
        "LRQuant+: factors of the scale, two branches, dynamic weights",
        fast=True,
        balanced=True,
        best=True,
    )
    two_branch: bool | None = setting(
        None,
        "compare with the full-precision block on the quantised input too (with --lr-plus)",
        part_of="lr_plus",
    )
    dynamic_weights: bool | None = setting(
        None, "weigh loss terms by their running means (default: with --lr-plus)", part_of="lr_plus"
    )
    ema_init: str = setting(
        "first",
        "running means start at the first loss, or at one as published",
        ("first", "one"),
        paper="one",
    )
    loss: str = setting(
        "mse+nlc", "terms of the block loss, joined by + (LRQuant: mse+nlc)", paper="mse+nlc"
    )
    epochs: int = setting(
        10,
        "passes over the samples a block; 0 learns nothing",
        limits=(0, 10_000),
        fast=5,
        paper=20,
    )
    window: int = setting(
        1,
        "consecutive blocks that are learned together, by the error after the last of them",
        limits=(1, 10_000),
    )
    keep_best: bool = setting(
        True, "keep the epoch with the lowest loss over all samples", paper=False
    )
    expert_tokens: int = setting(
        512,
        "calibration tokens that must reach an expert for it to be learned: others keep what is "
        "searched",
        limits=(0, MANY),
    )
    expert_group: int = setting(
        0,
        "experts of a block that are learned at a time, each one's weights made when it computes, "
        "for blocks that leave memory (0: all, kept)",
        limits=(0, MANY),
    )
    wd: float = setting(0.0, "weight decay", limits=(0, FASTEST))
    batch_size: int = setting(
        1, "samples a step, of all processes together", limits=(1, MANY), paper=1
    )
    micro_batch_size: int = setting(
        1,
        "samples that go through a block at once; a step's gradient is the sum of theirs in order",
        limits=(1, MANY),
    )

    calib_dataset: str = setting(
        "wikitext2",
        "wikitext2, c4, ptb, pile, mix, a set in --data-dir, a text file, self (what the model "
        "itself writes), or several of these joined by commas",
    )
    nsamples: int = setting(128, "calibration samples", limits=(1, MANY), paper=128, best=256)
    seqlen: int = setting(
        2048, "tokens a sample, and a perplexity window", limits=(2, 2**24), paper=2048
    )
    text_column: str | None = setting(
        None, "column of the text in .jsonl, .json and .parquet files (default: as its rows say)"
    )
    bos: str = setting(
        "auto",
        "BOS before each window of text: as the model was trained, but by the field's convention "
        "for families whose published numbers have none (auto)",
        RULES,
    )
    vision_scheme: str | None = setting(
        None, "quantise the vision tower too, e.g. W8A8 (default: it stays in floating point)"
    )
    calib_images: str | None = setting(
        None, "calibrate on pictures too: a folder of them, or a .jsonl of conversations"
    )
    calib_image_share: float = setting(
        0.5, "share of the calibration samples that have pictures, where there are some"
    )
    image_token_weight: float = setting(
        1.0, "how much a picture's token counts in losses and statistics; one of text counts 1"
    )
    seed: int = setting(2, "seed of the calibration sampling", limits=(0, 2**63 - 1))
    data_dir: str | None = setting(None, "folder with SET/{train,validation,test}.txt")
    cache_dir: str | None = setting(None, "cache of hub downloads (default: the hub's own)")
    act_scales: str | None = setting(None, "channel maxima from `lrquant stats` (.pt)")
    act_shifts: str | None = setting(None, "channel midpoints from `lrquant stats` (.pt)")

    compare: bool | str = setting(
        False,
        "evaluate full precision and round-to-nearest beside it, or the run, checkpoint or model "
        "that is given",
    )
    tta: bool = setting(
        False, "test-time adaptation: measure also with blocks learned again on the test text"
    )
    tta_blocks: int = setting(1, "how many of the last blocks are adapted", limits=(1, 10_000))
    tta_epochs: int = setting(5, "passes over the test text", limits=(1, 10_000))
    limit: int = setting(-1, "windows a set and items a task (-1: all)", limits=(-1, 2**31 - 1))

    output_dir: str = setting("../log/", "run folder: config, log, blocks, results")
    report: bool = setting(
        True, "measure each learned block over a few samples, and write report.html, .md and .json"
    )
    examples: bool = setting(
        True,
        "show in the report what the model writes before and after: two short texts, where the "
        "whole model fits and is small enough for a minute",
    )
    log_dir: str | None = setting(
        None, "write losses and measures for TensorBoard here (lrquant[tensorboard])"
    )
    save_dir: str | None = setting(None, "write the quantised model as a checkpoint here")
    format: str | None = setting(
        None,
        "format of the checkpoint, or auto: what vLLM serves, else what transformers loads, else "
        "the native one (default: the one that --target loads, or compressed-tensors)",
    )
    target: str | None = setting(
        None,
        "runtime that must be able to load the result: what it can't hold is refused before "
        "learning, and --format is chosen for it",
        TARGETS,
    )
    save_dtype: str | None = setting(
        None,
        "dtype of a checkpoint's scales and unquantised tensors (default: the model's own)",
        ("bfloat16", "float16", "float32"),
    )
    push_to_hub: str | None = setting(
        None, "upload the checkpoint to this repository on the hub, which is made private if new"
    )
    resume: str | None = setting(
        None, "go on with this run folder; auto: with the one in --output_dir, if there is one"
    )
    overwrite: bool = setting(
        False, "replace the run in --output_dir, the checkpoint in --save_dir"
    )

    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    precision: str = setting(
        "auto", "matrix products: bfloat16 where fast (auto)", ("auto", "bfloat16", "float32")
    )
    compile: str = setting(
        "auto",
        "compile the quantizers, which then take a third of their time: auto where that pays",
        ("auto", "on", "off"),
    )
    cuda_graphs: bool = setting(
        False,
        "replay learning steps as CUDA graphs, to the same bytes: for blocks so small that a GPU "
        "waits for Python",
    )
    deterministic: bool = setting(
        True, "learn with CUDA kernels that give the same bytes at every run, a little slower"
    )
    offload: str = setting(
        "auto",
        "where hidden states live between blocks, and blocks while they are tuned end to end "
        "(disk: these on the host)",
        ("auto", "device", "host", "disk"),
    )

    def __post_init__(self) -> None:
        values = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        _require_types(type(self), values)
        refuse_empty(values, defaults_of(type(self)))
        for entry in dataclasses.fields(self):
            _require_allowed(entry.name, values[entry.name], entry)
        if not 0 < self.calib_image_share <= 1:
            raise LRQuantError(
                f"calib_image_share {self.calib_image_share}: use a share above 0, up to 1; for "
                "text alone leave --calib-images out"
            )
        if not 0 < self.image_token_weight <= HEAVIEST:
            raise LRQuantError(
                f"image_token_weight {self.image_token_weight}: use a number above 0, up to "
                f"{HEAVIEST:g}"
            )
        if self.limit == 0:
            raise LRQuantError("limit 0: use a whole number of at least 1, or -1 for all")
        self.schemes  # noqa: B018

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
            weight_grid=self.weight_grid,
            activation_group_size=self.activation_group_size,
            hadamard=self.hadamard,
            qk_hadamard=self.qk_hadamard,
        )

    @property
    def vision_quantization(self) -> Scheme | None:
        """The scheme of the vision tower, None where it stays in floating point."""
        if self.vision_scheme is None:
            return None
        scheme = Scheme.parse(self.vision_scheme)
        return dataclasses.replace(scheme, activation_symmetric=self.activation_symmetric)

    @property
    def schemes(self) -> Schemes:
        """The scheme of every matrix: the default, patterns, and the vision tower's."""
        patterns = parse_patterns(self.scheme_for, self.activation_symmetric)
        return Schemes(self.quantization, patterns, self.vision_quantization)

    @property
    def net_name(self) -> str:
        """The model's short name."""
        return self.net or (Path(self.model).absolute().name if self.model else "")


@cache
def hints_of(kind: type[Any]) -> SettingDict:
    """The types of a class of settings, by name."""
    return typing.get_type_hints(kind)


def defaults_of(kind: type[Any]) -> SettingDict:
    """The defaults of a class of settings, by name."""
    return {entry.name: entry.default for entry in dataclasses.fields(kind)}


def _require_types(kind: type, values: SettingDict) -> None:
    for name, hint in hints_of(kind).items():
        value = values.get(name)
        if name in values and convert(hint, value, name) != value and value == value:  # nan is one
            raise LRQuantError(f"{name}: {shown(value)} is of another kind than it takes")


def _require_allowed(name: str, value: Any, entry: dataclasses.Field[Any]) -> None:
    """Refuse a value outside a setting's limits or choices."""
    limits, choices = entry.metadata["limits"], entry.metadata["choices"]
    if value is None and entry.default is None:
        return
    if limits is not None and not limits[0] <= value <= limits[1]:
        whole = isinstance(value, int)
        ends = [str(end) if whole else f"{end:g}" for end in limits]
        kind = "whole number" if whole else "number"
        said = shown(value) if whole else value
        raise LRQuantError(f"{name} {said}: use a {kind} from {ends[0]} to {ends[1]}")
    odd = [
        each for each in (value if isinstance(value, tuple) else (value,)) if each not in choices
    ]
    if choices and odd:
        words = "some" if isinstance(value, tuple) else "one"
        near = nearest(str(odd[0]), choices)
        raise LRQuantError(f"{name} {odd[0]!r}: use {words} of {', '.join(choices)}{near}")
