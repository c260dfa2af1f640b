"""The whole story: a model path and a scheme in; learned blocks, records and measures out."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from lrquant.blocks.inputs import BlockInputs
from lrquant.blocks.materialize import materialize
from lrquant.blocks.plan import Plan
from lrquant.blocks.variants import as_learned, full_precision
from lrquant.blocks.workbench import Workbench, advance_full_precision, make_workbench
from lrquant.config.config import Config, optional_path, typed_settings
from lrquant.config.scheme import FLOAT_BITS
from lrquant.config.schemes import Schemes
from lrquant.data.calibration import calibration_of
from lrquant.data.feeds import Feed
from lrquant.data.prompts import Reader
from lrquant.data.vocabulary import strange_tokenizer
from lrquant.errors import LRQuantError
from lrquant.export.checkpoint import check_format, checkpoint_dtype, save_checkpoint
from lrquant.export.choice import choose_format
from lrquant.export.format import Format
from lrquant.export.kernels import check_kernels
from lrquant.export.protected import check_target
from lrquant.export.targets import verdicts
from lrquant.files.publishing import heal, target_lock
from lrquant.files.whole import JsonObject
from lrquant.ingredients.base.statistics import ChannelStatistics, given_statistics
from lrquant.learn.checks import check_grids, check_ingredients, check_patterns, parts_of
from lrquant.learn.identity import describe_method, describe_run, environment
from lrquant.learn.model import learn_model
from lrquant.measures.comparison import TaskBoard
from lrquant.measures.reference import reference_name
from lrquant.measures.run import evaluate_run, prepare_evaluation
from lrquant.measures.subject import (
    Subject,
    check_comparison,
    measure_subject,
    open_reference,
    open_subject,
)
from lrquant.measures.zero_shot import load_tasks
from lrquant.model.device import dtype_name
from lrquant.model.loading import from_module, load_model
from lrquant.model.model import Model
from lrquant.model.outer import require_finite
from lrquant.report.writing import write_report
from lrquant.runs.block_file import BlockRecord
from lrquant.runs.claims import held, require_claimable
from lrquant.runs.folder import RunFolder
from lrquant.runs.progress import Progress
from lrquant.runs.resolution import (
    NO_MEASURES,
    asks_for_measures,
    measures_anything,
    resolve_settings,
)
from lrquant.runs.results import beside, conditions, of_base
from lrquant.runs.tensorboard import with_tensorboard

logger = logging.getLogger("lrquant")
_KEPT_LINES = 10_000


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, resolved settings, model and measures."""

    folder: RunFolder
    config: Config
    workbench: Workbench
    results: JsonObject

    @property
    def records(self) -> list[BlockRecord]:
        """Losses, seconds and memory of every block."""
        return self.folder.records()

    def load_model(self) -> PreTrainedModel:
        """The learned model as a transformers model in memory that computes as it was learned.

        Weights are dense and activations are quantised by hooks: for evaluation, not for serving.
        """
        return materialize(self.workbench, as_learned(self.workbench, self.folder))


def quantize(
    model: str | Path | PreTrainedModel,
    scheme: str | None = None,
    *,
    tokenizer: Any = None,
    processor: Any = None,
    samples: Tensor | Feed | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Run:
    """Learn a quantised model and measure it; `settings` are the fields of `Config`.

    `model` is a local folder, hub name, GGUF file or an in-memory transformers model (then with its
    `tokenizer`, or `processor` if it takes pictures, unless token ids (samples, tokens) or a `Feed`
    are given as `samples`).  Raises LRQuantError for anything the caller can mend.
    """
    if isinstance(model, str | Path):
        return run({"model": str(model), "scheme": scheme, **settings}, None, samples, progress)
    if not isinstance(model, PreTrainedModel):
        raise LRQuantError(
            f"model of type {type(model).__name__}: expected a folder, a hub name, a GGUF file or "
            "a transformers model"
        )
    name = model.config.name_or_path or type(model).__name__
    loaded = from_module(model, tokenizer, processor)
    return run({"model": name, "scheme": scheme, **settings}, loaded, samples, progress)


def run(
    settings: JsonObject,
    model: Model | None = None,
    samples: Tensor | Feed | None = None,
    progress: Progress | None = None,
) -> Run:
    """Carry out one configuration, given as the fields of `Config`, from start to end.

    With `epochs` 0 and `resume`, the finished run that `resume` names is measured as it is: model,
    scheme and method are its own, and only what says how to measure is taken from `settings`.
    """
    with _kept_log() as earlier, ExitStack() as locks:
        config, measure_only = resolve_settings(settings)
        _claim_places(config, measure_only, locks)
        return _run(config, measure_only, model, samples, progress or Progress(), earlier)


def _claim_places(config: Config, measure_only: bool, locks: ExitStack) -> None:
    """Lock all that will be written, and refuse what is someone else's, before any hour is spent.

    A finished run that is exported is only read: its blocks carry what they belong to.
    """
    output = Path(config.output_dir)
    if not measure_only or measures_anything(config):
        locks.enter_context(held(output))
        in_place = output.resolve() == Path(config.resume or "").resolve()
        if not measure_only and config.resume is None:
            RunFolder(output).require_replaceable(config)
        elif measure_only and not in_place:
            require_claimable(output, "results")
        else:
            RunFolder(output).require_format()
            if in_place and not measure_only:
                RunFolder(output).mend_records()
            require_claimable(output, "run")
    if config.save_dir is not None:
        locks.enter_context(target_lock(Path(config.save_dir)))
        heal(Path(config.save_dir))
        check_target(config, Path(config.save_dir))


def _run(
    config: Config,
    measure_only: bool,
    model: Model | None,
    samples: Tensor | Feed | None,
    progress: Progress,
    earlier: MemoryHandler,
) -> Run:
    progress = with_tensorboard(progress, config.log_dir)
    plan = Plan.of(config)
    logger.info("scheme %s", plan.schemes.describe())
    if config.vision_quantization is not None:
        logger.info("vision tower %s", config.vision_quantization.describe())
    logger.info("method %s", describe_method(config))
    check_comparison(config)
    form = None
    if config.save_dir is not None or (config.target and not measure_only):
        form = choose_format(plan, config.format, config.target)
        _tell_runtimes(form, plan.schemes, config.target)
    tasks = load_tasks(config)
    model = model or load_model(config.model, optional_path(config.cache_dir))
    strange = strange_tokenizer(model)
    if strange is not None:
        logger.warning("%s", strange)
    check_patterns(model, plan)
    for part, own in parts_of(model, plan):
        check_grids(part, own)
        check_ingredients(part, own)
    dtype = None
    if form is not None:
        dtype = checkpoint_dtype(model, plan, form)
        check_format(model, plan, form, dtype)
        if config.target is not None:
            check_kernels(model, plan, form, config.target)
    require_finite(model, dtype)
    workbench = make_workbench(model, config, plan)
    logger.info("matrix products in %s on %s", dtype_name(workbench.dtype), workbench.device)
    evaluation = prepare_evaluation(config, model)

    output = Path(config.output_dir)
    if measure_only:
        folder = RunFolder.open(Path(config.resume or ""))
        folder.require_same({"model": model.fingerprint()})
        if output.resolve() != folder.path.resolve():
            RunFolder(output).begin_results()
    else:
        folder = _learn(workbench, config, samples, progress, earlier)
    results_folder = RunFolder(output)
    with results_folder.logging(logger, earlier):
        about = _source(model)
        results = fresh = environment(config, workbench) | about
        if not measure_only:
            fresh |= {"learned_with": conditions(fresh)}
            results = results_folder.add_results(fresh)
        board = None if tasks is None else TaskBoard(tasks, config, results_folder)
        for measured in evaluate_run(workbench, config, folder, evaluation, progress, board):
            fresh = beside(fresh, environment(config, workbench) | about | measured)
            results = results_folder.add_results(fresh)
            progress.measured(measured)
        for measured in _measure_base(config, board, progress):
            fresh = beside(fresh, measured)
            results = results_folder.add_results(fresh)
    if config.save_dir is not None and form is not None:
        save_checkpoint(workbench, config, folder, Path(config.save_dir), form)
    progress.close()
    learned_or_measured = not measure_only or measures_anything(config)
    if config.report and learned_or_measured and output.resolve() == folder.path.resolve():
        logger.info("report %s", write_report(folder))
    return Run(folder, config, workbench, _answer(results, config))


def _tell_runtimes(form: Format, schemes: Schemes, target: str | None) -> None:
    """Say what the target, or each runtime that loads the format, will compute."""
    for exact, text in verdicts(form, schemes, target):
        logger.log(logging.INFO if exact else logging.WARNING, "%s: %s", form.name, text)


def _learn(
    workbench: Workbench,
    config: Config,
    samples: Tensor | Feed | None,
    progress: Progress,
    earlier: MemoryHandler,
) -> RunFolder:
    """A run folder of which every block is learned."""
    calibration = calibration_of(config, workbench.model, samples)
    logger.info("calibration %s", calibration.description)
    statistics = given_statistics(config)
    identity = describe_run(config, workbench.model, workbench, calibration)
    resumed = optional_path(config.resume)
    folder = RunFolder.start(Path(config.output_dir), config, identity, resumed)
    with folder.logging(logger, earlier):
        learn_model(workbench, config, calibration.feed, statistics, folder, progress)
    return folder


def collect_statistics(config: Config, progress: Progress | None = None) -> ChannelStatistics:
    """Channel statistics of every block's linears on the calibration text, in full precision."""
    progress = progress or Progress()
    model = load_model(config.model, optional_path(config.cache_dir))
    workbench = make_workbench(model, config)
    calibration = calibration_of(config, model, None)
    logger.info("calibration %s", calibration.description)
    entry = BlockInputs(model, calibration.feed, config.batch_size, workbench.device)
    (stream,) = workbench.streams(entry, 1)
    entry.embed(stream, full_precision(workbench).tower)
    statistics = ChannelStatistics()
    with progress.measuring("statistics", len(model.blocks)) as told:
        for index in range(len(model.blocks)):
            stored = workbench.stored(index)
            observe = statistics.observe
            advance_full_precision(workbench, index, stored, entry, stream, stream, observe)
            told(index)
    return statistics


def evaluate(target: str, progress: Progress | None = None, **settings: Any) -> JsonObject:
    """Measure a run folder, a checkpoint or a model; `settings` are fields of `Config`.

    Where they name no text and no task, a run is measured on its own ones, others on wikitext2.
    A run's results are added to its results.json, or go to `output_dir` if that is given.
    """
    if not isinstance(target, str | Path) or not str(target).strip():
        raise LRQuantError(f"target {target!r}: give a run folder, a checkpoint or a model")
    if (Path(target) / "run.json").is_file():
        return run({**settings, "resume": target, "epochs": 0}, progress=progress).results
    if not asks_for_measures(settings):
        settings["ppl"] = ("wikitext2",)
    if settings.get("tta"):
        raise LRQuantError(f"--tta {target}: needs a run folder; this is a model or checkpoint")
    settings = typed_settings({**settings, "model": target, "epochs": 0}, "settings")
    config = Config(**{**settings, "wbits": FLOAT_BITS, "abits": FLOAT_BITS}).resolved()
    check_comparison(config)
    if config.compare is True:
        raise LRQuantError(f"--compare {target}: needs a run folder; give what to compare it with")
    reference_name(target, config)
    folder = RunFolder(Path(config.output_dir)) if "output_dir" in settings else None
    with held(folder.path) if folder is not None else nullcontext():
        return _evaluate(target, config, folder, progress or Progress())


def _evaluate(
    target: str, config: Config, folder: RunFolder | None, progress: Progress
) -> JsonObject:
    if folder is not None:
        folder.begin_results()
    tasks = load_tasks(config)
    board = None if tasks is None else TaskBoard(tasks, config, folder)
    progress = with_tensorboard(progress, config.log_dir)
    own = _measure_target(target, config, board, progress)
    results: JsonObject = {}
    kept: JsonObject = {}
    for measured in itertools.chain(own, _measure_base(config, board, progress)):
        results = kept = beside(results, measured)
        if folder is not None:
            kept = folder.add_results(results)
    progress.close()
    return _answer(kept, config)


def _answer(results: JsonObject, config: Config) -> JsonObject:
    """All results, without the verdict of an earlier command."""
    asked = config.max_drop is not None
    return {name: value for name, value in results.items() if asked or name != "max_drop"}


def _measure_target(
    target: str, config: Config, board: TaskBoard | None, progress: Progress
) -> Iterator[JsonObject]:
    """Measures of a checkpoint or model, which is let go of when they are done."""
    reference = open_reference(target, config)
    subject = open_subject(target, config)
    for measured in measure_subject(
        subject, subject.variant, config, board, progress, reference=reference
    ):
        progress.measured(measured)
        about = environment(subject.settings or config, subject) | {"model": target}
        if reference is not None and isinstance(config.compare, str):
            measured = of_base(measured, _in_words(config.compare, reference))
        full = subject if reference is None else reference
        yield about | _source(full.reader) | measured


def _measure_base(
    config: Config, board: TaskBoard | None, progress: Progress
) -> Iterator[JsonObject]:
    """Measures of what `compare` names, if it names anything."""
    if isinstance(config.compare, str):
        subject = open_subject(config.compare, config)
        for measured in measure_subject(subject, "base", config, board, progress):
            progress.measured(measured)
            yield of_base(measured, _in_words(config.compare, subject))


def _in_words(name: str, subject: Subject) -> str:
    return f"{name} in {dtype_name(subject.dtype)}"


def _source(reader: Reader) -> dict[str, str]:
    """What "full precision" is, where the model's own weights had been quantised."""
    origin = reader.source.unpacked_from() if isinstance(reader, Model) else ""
    return {"unpacked_from": origin} if origin else {}


def export(finished: str, save_dir: str, progress: Progress | None = None, **settings: Any) -> Run:
    """Write another checkpoint of a finished run without learning or measuring again."""
    given = {**settings, "resume": finished, "epochs": 0, "save_dir": save_dir}
    return run({**given, **NO_MEASURES}, progress=progress)


@contextmanager
def _kept_log() -> Iterator[MemoryHandler]:
    """Keep the log until there is a run folder to write it to."""
    handler = MemoryHandler(_KEPT_LINES, flushLevel=logging.CRITICAL + 1)
    level = logger.level
    logger.setLevel(min(logger.getEffectiveLevel(), logging.INFO))
    logger.addHandler(handler)
    try:
        yield handler
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
