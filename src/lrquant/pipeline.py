"""The whole story: a model path and a scheme in; learned blocks, records and measures out."""

from __future__ import annotations

import logging
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from logging.handlers import MemoryHandler
from pathlib import Path

from lrquant.blocks.examples import write_examples
from lrquant.blocks.generation import OwnText
from lrquant.blocks.inputs import BlockInputs
from lrquant.blocks.plan import FULL_PRECISION, Plan
from lrquant.blocks.variants import full_precision
from lrquant.blocks.workbench import Workbench, advance_full_precision, make_workbench
from lrquant.config.config import Config, optional_path, typed_settings
from lrquant.config.groups import Calibrating, Computing, Learning, Places, Sources, StatisticsFiles
from lrquant.config.scheme import FLOAT_BITS
from lrquant.data.calibration import calibration_of
from lrquant.data.own import OwnData
from lrquant.errors import LRQuantError
from lrquant.files.publishing import heal, target_lock
from lrquant.files.whole import JsonObject
from lrquant.formats.checkpoint import save_checkpoint
from lrquant.formats.protected import check_target
from lrquant.ingredients.base.statistics import ChannelStatistics
from lrquant.learn.checks import require_alike
from lrquant.learn.identity import (
    begun_on,
    describe_method,
    describe_run,
    environment,
    gone_on_elsewhere,
)
from lrquant.learn.model import learn_model
from lrquant.learn.share import require_steps
from lrquant.learn.tuning import outcome_of_tuning
from lrquant.measures.choice import check_measures, measures_anything
from lrquant.measures.evaluation.evaluation import Evaluation
from lrquant.measures.evaluation.resolution import (
    asked_later,
    asks_for_measures,
    default_measures,
    resolve_settings,
)
from lrquant.measures.evaluation.telling import (
    add_measures,
    measure_base,
    measure_run,
    measure_target,
    source_of,
)
from lrquant.measures.evaluation.texts import require_known_texts
from lrquant.measures.subjects.reference import reference_name
from lrquant.measures.subjects.subject import (
    QUANTIZED,
    RunSubject,
    require_base,
)
from lrquant.model.arithmetic import full_precision_sums
from lrquant.model.loading import load_model
from lrquant.model.model import Model
from lrquant.preflight.prospect import Material, Prospect
from lrquant.preflight.requirements import requirements
from lrquant.preflight.sizes import sizes_of
from lrquant.reports.writing import write_report
from lrquant.runs.block_file import BlockRecord
from lrquant.runs.claims import held, require_claimable
from lrquant.runs.folder import RunFolder
from lrquant.runs.log import kept_log
from lrquant.runs.progress import Progress
from lrquant.runs.results import ASKED, conditions
from lrquant.runs.tensorboard import with_tensorboard
from lrquant.team.processes import joined
from lrquant.team.team import Team

logger = logging.getLogger("lrquant")


@dataclass
class Outcome:
    """What came of a run: its folder, resolved settings, model and measures."""

    folder: RunFolder
    config: Config
    workbench: Workbench
    results: JsonObject

    @property
    def records(self) -> list[BlockRecord]:
        """Losses, seconds and memory of every block."""
        return self.folder.records()


def run(
    settings: JsonObject,
    model: Model | None = None,
    calibration: OwnData | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Carry out one configuration, given as the fields of `Config`, from start to end.

    With `epochs` 0 and `resume`, the finished run that `resume` names is measured as it is: model,
    scheme and method are its own, and only what says how to measure is taken from `settings`.
    """
    with kept_log(logger) as earlier, ExitStack() as locks, full_precision_sums():
        with joined() as team:
            config, measure_only = team.first(partial(resolve_settings, settings))
            team.first(partial(_claim_places, config, measure_only, locks))
            progress = (progress or Progress()) if team.rank == 0 else Progress()
            progress = with_tensorboard(progress, config.log_dir if team.rank == 0 else None)
            plan = Plan.of(config.quantizing)
            prospect = Prospect(config, measure_only, plan, model, calibration)
            outcome = _run(prospect, progress, earlier, team)
        if team.rank == 0:
            _write(outcome, prospect)
        progress.close()
        return outcome


def _claim_places(config: Config, measure_only: bool, locks: ExitStack) -> None:
    """Lock all that will be written, and refuse what is someone else's, before any hour is spent.

    A finished run that is exported is only read: its blocks carry what they belong to.
    """
    output = Path(config.output_dir)
    if not measure_only or measures_anything(config.measuring):
        locks.enter_context(held(output))
        in_place = output.resolve() == Path(config.resume or "").resolve()
        if not measure_only and config.resume is None:
            RunFolder(output).require_replaceable(config.overwrite)
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
        check_target(config.group(Places), Path(config.save_dir))


def _run(prospect: Prospect, progress: Progress, earlier: MemoryHandler, team: Team) -> Outcome:
    """Learn, or take what is learned, and measure it."""
    config, measure_only, plan = prospect.config, prospect.measure_only, prospect.plan
    learning = config.group(Learning)
    logger.info("scheme %s", plan.schemes.describe())
    if config.vision_quantization is not None:
        logger.info("vision tower %s", config.vision_quantization.describe())
    logger.info("method %s", describe_method(plan, learning))
    if team.size > 1:
        logger.info("%d processes, each with its share of the samples", team.size)
    if not measure_only:
        require_steps(learning.batch_size, learning.micro_batch_size, team.size)
    _require_all(prospect, team)
    workbench, evaluation, reading = prospect.workbench, prospect.evaluation, prospect.reading
    assert workbench is not None and evaluation is not None and reading is not None
    require_alike(team, workbench)
    folder = _learn(prospect, workbench, progress, earlier, team)
    evaluation.team = team
    subject = RunSubject(QUANTIZED, workbench, config, folder, team)
    own = measure_run(subject, evaluation, reading, progress)
    measured = chain(own, measure_base(evaluation, progress))
    if team.rank:
        return Outcome(folder, config, workbench, add_measures(measured, {}, None))

    results_folder = evaluation.folder = RunFolder(Path(config.output_dir))
    with results_folder.logging(logger, earlier):
        about = environment(config.model, plan, learning, config.seed, workbench)
        about |= source_of(workbench.model) | outcome_of_tuning(folder)
        if not measure_only:
            about |= {"learned_with": conditions(about)} | _told_of(workbench, config, folder)
            results_folder.add_results(about)
        about |= _asked(config, folder)
        folder.require_finished()
        results = add_measures(measured, about, results_folder)
    return Outcome(folder, config, workbench, results)


def _write(outcome: Outcome, prospect: Prospect) -> None:
    """The checkpoint and the report, where they are asked for."""
    config, folder = outcome.config, outcome.folder
    if config.save_dir is not None and prospect.form is not None:
        target = Path(config.save_dir)
        save_checkpoint(outcome.workbench, config.origin, folder, target, prospect.form)
    learned_or_measured = not prospect.measure_only or measures_anything(config.measuring)
    in_place = Path(config.output_dir).resolve() == folder.path.resolve()
    if config.report and learned_or_measured and in_place:
        logger.info("report %s", write_report(folder))


def _told_of(workbench: Workbench, config: Config, folder: RunFolder) -> JsonObject:
    """What a report tells beside measures, taken while the model is there."""
    if not config.report:
        return {}
    sizes: JsonObject = {"sizes": sizes_of(workbench)}
    return sizes | (write_examples(workbench, folder) if config.examples else {})


def _asked(config: Config, folder: RunFolder) -> JsonObject:
    """What this command asks to measure, where the run's own settings do not."""
    asked = asked_later(config, folder.config)
    return {ASKED: [asked]} if asked else {}


def _require_all(prospect: Prospect, team: Team) -> None:
    """Make every check of a run; the first that refuses it ends the command.

    Of a team the first member makes them, and the others are given what it has read.
    """

    def checked() -> Material:
        for check in requirements(prospect):
            for said in check.of():
                if said.logged:
                    level = logging.INFO if said.state == "ok" else logging.WARNING
                    logger.log(level, "%s", said.logged)
        return prospect.material

    material = team.first(checked)
    if team.rank:
        prospect.take_over(material, team)


def _learn(
    prospect: Prospect,
    workbench: Workbench,
    progress: Progress,
    earlier: MemoryHandler,
    team: Team,
) -> RunFolder:
    """A run folder of which every block is learned, or the finished one that is measured.

    Of a team the first member alone opens it, and writes.
    """
    config, calibration = prospect.config, prospect.calibration
    place = config.resume or "" if prospect.measure_only else config.output_dir
    folder = RunFolder(Path(place))
    if team.rank == 0:
        folder = _opened(prospect, workbench)
    if calibration is None:
        return folder
    with folder.logging(logger, earlier) if team.rank == 0 else nullcontext():
        if team.rank == 0:
            _say_if_elsewhere(folder, workbench)
        if prospect.writer is not None:
            folder.keep_texts(prospect.writer.kept)
        learning, statistics = config.group(Learning), prospect.statistics
        tuning = None if prospect.tuning is None else prospect.tuning.feed
        rest = folder, progress, config.report
        own = workbench, learning, calibration.feed, statistics
        with workbench.learning():
            learn_model(*own, *rest, tuning=tuning, team=team)
    return folder


def _say_if_elsewhere(folder: RunFolder, workbench: Workbench) -> None:
    elsewhere = gone_on_elsewhere(folder.identity.get("begun_on"), begun_on(workbench))
    if elsewhere is not None:
        logger.warning("the run %s", elsewhere)


def _opened(prospect: Prospect, workbench: Workbench) -> RunFolder:
    """The run folder, begun, gone on with or only read."""
    config, output = prospect.config, Path(prospect.config.output_dir)
    if prospect.calibration is None:
        folder = RunFolder.open(Path(config.resume or ""))
        folder.require_same({"model": workbench.model.fingerprint()})
        if output.resolve() != folder.path.resolve():
            RunFolder(output).begin_results()
        return folder
    learning, files = config.group(Learning), config.group(StatisticsFiles)
    about = prospect.calibration, files, prospect.tuning
    identity = describe_run(workbench, learning, *about)
    return RunFolder.start(output, config, identity, optional_path(config.resume))


@full_precision_sums()
def collect_statistics(config: Config, progress: Progress | None = None) -> ChannelStatistics:
    """Channel statistics of every block's linears on the calibration text, in full precision."""
    progress = progress or Progress()
    model = load_model(config.model, optional_path(config.cache_dir))
    computing, scratch = config.group(Computing), Path(config.output_dir)
    workbench = make_workbench(model, FULL_PRECISION, computing, scratch)
    asked, sources = config.group(Calibrating), config.group(Sources)
    calibration = calibration_of(asked, sources, model, None, OwnText(workbench))
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
    return statistics.on_host()


def evaluate(target: str, settings: JsonObject, progress: Progress | None = None) -> JsonObject:
    """Measure a checkpoint or a model; where no text and no task is named, on wikitext2.

    Results go to `output_dir`, if that is given.
    """
    if not asks_for_measures(settings):
        settings = {**settings, **default_measures()}
    if settings.get("tta"):
        raise LRQuantError(f"--tta {target}: needs a run folder; this is a model or checkpoint")
    settings = typed_settings({**settings, "model": target, "epochs": 0}, "settings")
    config = Config(**{**settings, "wbits": FLOAT_BITS, "abits": FLOAT_BITS}).resolved()
    check_measures(config.measuring, bool(config.compare))
    require_base(config)
    if config.compare is True:
        raise LRQuantError(f"--compare {target}: needs a run folder; give what to compare it with")
    reference_name(target, config)
    with joined() as team, ExitStack() as stack, full_precision_sums():
        team.first(partial(require_known_texts, config.measuring, config.group(Sources)))
        folder = None
        if "output_dir" in settings and team.rank == 0:
            folder = RunFolder(Path(config.output_dir))
            stack.enter_context(held(folder.path))
            folder.begin_results()
        progress = (progress or Progress()) if team.rank == 0 else Progress()
        progress = with_tensorboard(progress, config.log_dir if team.rank == 0 else None)
        evaluation = Evaluation(config, folder, team)
        own = measure_target(target, evaluation, progress)
        results = add_measures(chain(own, measure_base(evaluation, progress)), {}, folder)
        progress.close()
        return results
