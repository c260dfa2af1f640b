"""Groups of settings: what a room is given in place of all of them, picked by `Config.group`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from lrquant.config.learned import LearnedSettings
from lrquant.config.schemes import Schemes

SETTING = "setting"  # in the metadata of a field: the setting that it is, where called otherwise
MeasureSettings: TypeAlias = Mapping[type, object]  # those of every measure, by their class


@dataclass(frozen=True)
class Computing:
    """Where, in what and how a model computes, as the settings of these names say."""

    device: str
    precision: str
    offload: str
    compile: str = "off"
    cuda_graphs: bool = False
    deterministic: bool = True
    expert_group: int = 0


@dataclass(frozen=True)
class Quantizing:
    """Schemes by matrix, what is learned in the language part and in the vision tower, and the
    dtype of scales by name (None: that of the weights)."""

    schemes: Schemes
    ingredients: tuple[LearnedSettings, ...]
    tower_ingredients: tuple[LearnedSettings, ...]
    save_dtype: str | None


@dataclass(frozen=True)
class Learning:
    """How blocks are learned, `window` of them together; ingredients bring rates and optimizers.

    Its names and their order are those of a run's identity; settings are to be resolved first.
    """

    epochs: int
    weight_decay: float = field(default=0.0, metadata={SETTING: "wd"})
    loss: str = "mse+nlc"
    window: int = 1
    two_branch: bool = False
    dynamic_weights: bool = False
    ema_init: str = "first"
    keep_best: bool = False
    batch_size: int = 1
    micro_batch_size: int = 1
    expert_tokens: int = 0
    expert_group: int = 0


@dataclass(frozen=True)
class Adapting:
    """Test-time adaptation: how many of the last blocks are learned again, and for how long."""

    blocks: int = field(metadata={SETTING: "tta_blocks"})
    epochs: int = field(metadata={SETTING: "tta_epochs"})


@dataclass(frozen=True)
class Sources:
    """Where texts and sets come from, and how they are read.

    Windows have `seqlen` tokens, with or without a beginning as `bos` says; of a set to measure
    the first `limit` are taken, all with -1.  `text_column` is that of the text in files of rows.
    """

    data_dir: str | None
    cache_dir: str | None
    text_column: str | None
    bos: str
    seqlen: int
    limit: int

    @property
    def data_folder(self) -> Path | None:
        """The folder of one's own sets."""
        return None if self.data_dir is None else Path(self.data_dir)

    @property
    def cache_folder(self) -> Path | None:
        """The cache of hub downloads, None where it is the hub's own."""
        return None if self.cache_dir is None else Path(self.cache_dir)


@dataclass(frozen=True)
class Calibrating:
    """What is drawn to learn on: `count` samples of a data set, some with pictures.

    `image_share` of them have some, where there are `images`, of which a token counts
    `image_token_weight`.
    """

    dataset: str = field(metadata={SETTING: "calib_dataset"})
    count: int = field(metadata={SETTING: "nsamples"})
    seed: int
    images: str | None = field(metadata={SETTING: "calib_images"})
    image_share: float = field(metadata={SETTING: "calib_image_share"})
    image_token_weight: float


@dataclass(frozen=True)
class StatisticsFiles:
    """Files of channel maxima and midpoints, as `lrquant stats` writes them."""

    maxima: str | None = field(metadata={SETTING: "act_scales"})
    midpoints: str | None = field(metadata={SETTING: "act_shifts"})

    @property
    def named(self) -> tuple[str, ...]:
        """Those that are given."""
        return tuple(path for path in (self.maxima, self.midpoints) if path is not None)


@dataclass(frozen=True)
class Places:
    """What settings name: but for what `overwrite` lets go of, nothing of it is written over."""

    output_dir: str
    overwrite: bool
    model: str
    resume: str | None
    compare: bool | str
    calib_dataset: str
    calib_images: str | None
    act_scales: str | None
    act_shifts: str | None
    data_dir: str | None
    measuring: MeasureSettings


@dataclass(frozen=True)
class Origin:
    """What a checkpoint tells of the run that it is of, with all `settings` as YAML, where it
    must not lie, and the repository on the hub to which it goes, if any."""

    net_name: str
    learning: Learning
    seed: int
    settings: str
    places: Places
    repository: str | None = None
