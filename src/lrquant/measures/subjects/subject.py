"""A run, a checkpoint or a model as it is measured: its variants, and what makes its inputs."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lrquant.blocks.head import Head
from lrquant.blocks.inputs import BlockInputs
from lrquant.blocks.materialize import materialize
from lrquant.blocks.placement import fits_device
from lrquant.blocks.plan import FULL_PRECISION as UNQUANTIZED
from lrquant.blocks.plan import Plan
from lrquant.blocks.runner import Variant
from lrquant.blocks.streams import Stream
from lrquant.blocks.variants import as_learned, full_precision, unlearned
from lrquant.blocks.workbench import Workbench, make_workbench
from lrquant.config.config import Config, optional_path
from lrquant.config.groups import Adapting, Computing, Learning
from lrquant.data.prompts import Reader
from lrquant.data.samples import Samples
from lrquant.learn.adaptation import adapt, adapted_to, describe_adaptation
from lrquant.measures.scoring.predictions import send_through
from lrquant.measures.subjects.checkpoint import (
    Checkpoint,
    is_checkpoint,
    loaded,
    stored_checkpoint,
)
from lrquant.measures.subjects.reference import reference_name
from lrquant.measures.subjects.stored import Stored
from lrquant.model.device import choose_device
from lrquant.model.loading import load_model
from lrquant.model.model import Model
from lrquant.model.sources import resolve_model
from lrquant.runs.folder import RunFolder, is_run
from lrquant.runs.progress import Progress
from lrquant.runs.results import Entry
from lrquant.team.launch import Launch
from lrquant.team.team import ALONE, Team, holds_for_all

logger = logging.getLogger("lrquant")
EVALUATION_TOKENS = 2048  # tokens of one forward, in windows
FULL_PRECISION, ROUND_TO_NEAREST = "full_precision", "round_to_nearest"
QUANTIZED, ADAPTED, BASE = "quantized", "test_time_adapted", "base"


class Subject(ABC):
    """What is measured.

    `own` names the column of the model itself in results, and `beside` others that it can be told
    of: its full precision, and the same rounded to nearest.
    """

    own: str
    beside: ClassVar[tuple[str, ...]] = ()

    @property
    def of_first(self) -> bool:
        """Whether of several processes the first alone has it, and measures it alone."""
        return False

    @property
    @abstractmethod
    def reader(self) -> Reader:
        """What makes its inputs."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where it computes."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """In what it computes."""

    @property
    @abstractmethod
    def settings(self) -> Config | None:
        """What it was learned with, if anything."""

    @abstractmethod
    def final_states(self, variant: str, text: Samples, progress: Progress) -> Stream:
        """Hidden states of a text after the last block."""

    @abstractmethod
    def head(self) -> Callable[[Tensor], Tensor]:
        """What makes logits (batch, tokens, vocabulary) of final hidden states."""

    @abstractmethod
    def module(self, variant: str, team: Team = ALONE) -> PreTrainedModel:
        """A variant as a whole transformers model, for every member of a team."""

    def fits(self, processes: int) -> bool:
        """Whether each of a machine's processes can have a variant whole on its device."""
        return True

    def adapt(self, text: Samples, progress: Progress) -> tuple[str, Entry] | None:
        """Learn again on a text: how, and what came of it; None where nothing is to be adapted.

        The text's final states are then also to be had of the variant `ADAPTED`.
        """
        return None


@dataclass(frozen=True)
class BlockSubject(Subject):
    """A model of which one block is in memory at a time, as learned where there is a run.

    Of a `team` the first member alone reads what was learned.
    """

    own: str
    workbench: Workbench
    config: Config | None = None
    folder: RunFolder | None = None
    team: Team = ALONE

    @property
    def reader(self) -> Model:
        return self.workbench.model

    @property
    def device(self) -> torch.device:
        return self.workbench.device

    @property
    def dtype(self) -> torch.dtype:
        return self.workbench.dtype

    @property
    def settings(self) -> Config | None:
        return self.config

    def final_states(self, variant: str, text: Samples, progress: Progress) -> Stream:
        entry = entry_of(self.workbench, text)
        (stream,) = self.workbench.streams(entry, 1)
        blocks = len(self.reader.blocks)
        with progress.measuring(f"{text.name} {variant}", blocks) as told:
            send_through(self.reader, self._prepared(variant, text.name), stream, entry, told)
        return stream

    def head(self) -> Head:
        return Head(self.reader, self.device, self.dtype)

    def module(self, variant: str, team: Team = ALONE) -> PreTrainedModel:
        return materialize(self.workbench, replace(self, team=team)._prepared(variant))

    def fits(self, processes: int) -> bool:
        return fits_device(self.workbench, processes)

    def _prepared(self, variant: str, text: str = "") -> Variant:
        """How a variant's blocks are made ready; `text` is what the adapted one was adapted to."""
        if variant == ROUND_TO_NEAREST:
            return unlearned(self.workbench)
        if self.folder is None or variant == FULL_PRECISION:
            return full_precision(self.workbench)
        if variant != ADAPTED:
            return as_learned(self.workbench, self.folder, team=self.team)
        last = 0 if self.config is None else self.config.tta_blocks
        adapted = adapted_to(text, self.folder)
        return as_learned(self.workbench, self.folder, adapted, last, self.team)


@dataclass(frozen=True)
class RunSubject(BlockSubject):
    """The run that a command is about: its full precision and round-to-nearest can be beside."""

    beside: ClassVar[tuple[str, ...]] = (FULL_PRECISION, ROUND_TO_NEAREST)

    def adapt(self, text: Samples, progress: Progress) -> tuple[str, Entry] | None:
        assert self.config is not None and self.folder is not None
        if not self.config.tta:
            return None
        learning, adapting = self.config.group(Learning), self.config.group(Adapting)
        own = self.folder, text, progress
        with self.workbench.learning():
            outcome = adapt(self.workbench, learning, adapting, *own, team=self.team)
        return describe_adaptation(adapting, self.workbench.plan.ingredients), outcome


@dataclass(frozen=True)
class CheckpointSubject(Subject):
    """A checkpoint, whole in memory as transformers loads it: it has one variant.

    Where it is `apart`, only the first of several processes has its values.
    """

    own: str
    checkpoint: Checkpoint
    apart: bool = False

    @property
    def of_first(self) -> bool:
        return self.apart

    @property
    def reader(self) -> Checkpoint:
        return self.checkpoint

    @property
    def device(self) -> torch.device:
        return self.checkpoint.device

    @property
    def dtype(self) -> torch.dtype:
        return self.checkpoint.dtype

    @property
    def settings(self) -> Config | None:
        return self.checkpoint.settings

    def final_states(self, variant: str, text: Samples, progress: Progress) -> Stream:
        with progress.measuring(f"{text.name} checkpoint", len(text.feed), "windows") as told:
            return self.checkpoint.final_states(text, told)

    def head(self) -> Callable[[Tensor], Tensor]:
        return self.checkpoint.head

    def module(self, variant: str, team: Team = ALONE) -> PreTrainedModel:
        return self.checkpoint.module


def open_subject(name: str, config: Config, own: str | None = None, team: Team = ALONE) -> Subject:
    """The run folder, checkpoint or model that `name` is; `config` says where it computes.

    `own` is what its column is called, where that is not what it is.
    """
    if is_run(Path(name)):
        return _run(own or QUANTIZED, name, config, team)
    cache = optional_path(config.cache_dir)
    if is_checkpoint(name, cache):
        stored = stored_checkpoint(name, config.group(Computing), cache)
        return _checkpoint(own or QUANTIZED, stored, config, team)
    return _model(own or FULL_PRECISION, name, config)


def require_base(config: Config) -> None:
    """Refuse early to compare with what is neither a finished run nor a model."""
    if not isinstance(config.compare, str):
        return
    if is_run(Path(config.compare)):
        RunFolder.open(Path(config.compare)).require_finished()
    else:
        resolve_model(config.compare, optional_path(config.cache_dir))


def open_reference(target: str, config: Config) -> Subject | None:
    """The full-precision model that `target` is to be held against, if a measure asks for one."""
    name = reference_name(target, config)
    if name is None:
        return None
    return _model(BASE if name == config.compare else FULL_PRECISION, name, config)


def _run(own: str, name: str, config: Config, team: Team) -> Subject:
    folder = RunFolder.open(Path(name))
    folder.require_finished()
    model = load_model(folder.config.model, optional_path(config.cache_dir))
    computing = replace(config.group(Computing), expert_group=folder.config.expert_group)
    plan, scratch = Plan.of(folder.config.quantizing), Path(config.output_dir)
    workbench = make_workbench(model, plan, computing, scratch)
    folder.require_same({"model": model.fingerprint()})
    return BlockSubject(own, workbench, folder.config, folder, team)


def _checkpoint(own: str, stored: Stored, config: Config, team: Team) -> Subject:
    """Loaded by each of a team, or where one has no room for it by the first, from all devices."""
    device, together = choose_device(config.device), Launch.of_environment().local_size
    apart = team.size > 1 and not holds_for_all(team, stored.fits(device, together))
    if apart:
        told = stored.name, team.size
        logger.info("checkpoint %s: too large for each of %d processes; the first has it", *told)
    if apart and team.rank:
        return CheckpointSubject(own, Checkpoint(stored.name, stored.skeleton, None, None), apart)
    return CheckpointSubject(own, loaded(stored, device, Path(config.output_dir)), apart)


def _model(own: str, name: str, config: Config) -> Subject:
    model = load_model(name, optional_path(config.cache_dir))
    computing, scratch = config.group(Computing), Path(config.output_dir)
    return BlockSubject(own, make_workbench(model, UNQUANTIZED, computing, scratch))


def entry_of(workbench: Workbench, text: Samples) -> BlockInputs:
    """What goes into the first block: text in batches of `EVALUATION_TOKENS`, pictures singly."""
    return BlockInputs(workbench.model, text.feed, _at_once(text), workbench.device)


def own_windows(text: Samples, team: Team) -> tuple[Samples, bool]:
    """A member's windows of a text, the first member's first; whether they count.

    They are whole batches of those that all would form.  A member for which there are none computes
    what another does, which does not count.
    """
    size, windows = _at_once(text), len(text.feed)
    batches = -(-windows // size)
    first, end = (batches * rank // team.size for rank in (team.rank, team.rank + 1))
    counts = end > first
    first, end = (first, end) if counts else (0, 1)
    return text.only(range(first * size, min(end * size, windows))), counts


def _at_once(text: Samples) -> int:
    """How many windows go through a block together."""
    return 1 if text.prompts is not None else max(1, EVALUATION_TOKENS // text.ids.shape[1])
