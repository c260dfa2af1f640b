"""The checks of a run in order: `check` collects what each says, `quantize` stops at the first.

A check is a function that raises LRQuantError where a run would not get through, and else says what
there is to know.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from lrquant.blocks.generation import OwnText
from lrquant.blocks.workbench import make_workbench
from lrquant.config.config import optional_path
from lrquant.config.groups import (
    Adapting,
    Calibrating,
    Computing,
    Learning,
    Sources,
    StatisticsFiles,
)
from lrquant.config.scheme import Scheme
from lrquant.data.calibration import calibration_of, tuning_samples_of
from lrquant.data.prompts import takes_pictures
from lrquant.data.samples import require_known_sets, written_by_the_model
from lrquant.data.vocabulary import strange_tokenizer
from lrquant.errors import LRQuantError
from lrquant.formats.checkpoint import checkpoint_dtype
from lrquant.formats.choice import AUTO, NATIVE, choose_format, why_native
from lrquant.formats.hub import require_repository
from lrquant.formats.targets import loading_of, verdicts
from lrquant.ingredients.base.statistics import given_statistics
from lrquant.ingredients.tuning import Tuning
from lrquant.learn.adaptation import check_adaptation
from lrquant.learn.checks import check_grids, check_ingredients, check_samples
from lrquant.learn.compiling import compiling
from lrquant.learn.identity import dtype_name
from lrquant.learn.model import require_pictures
from lrquant.measures.choice import AnyModule, check_measures, module_measures
from lrquant.measures.evaluation.evaluation import Evaluation
from lrquant.measures.evaluation.texts import (
    AskedText,
    read_texts,
    require_known_texts,
    texts_of,
)
from lrquant.measures.subjects.subject import require_base
from lrquant.model.loading import load_model
from lrquant.model.model import Model
from lrquant.model.outer import require_finite
from lrquant.preflight.prospect import Check, Prospect, Said, State
from lrquant.preflight.shapes import groups, patterns, shapes
from lrquant.preflight.whole_model import of_whole_model, whole_model
from lrquant.runs.folder import RunFolder

NOT_ESTIMATED = "its time is not estimated"


def requirements(run: Prospect) -> Iterator[Check]:
    """Every check in order; each is to be made before the next is asked for.

    The walk ends where there is no model.
    """
    yield Check("evaluation", lambda: _settings_of_measures(run))
    yield Check("format", lambda: _format(run))
    if run.config.push_to_hub is not None:
        yield Check("hub", lambda: _repository(run))
    yield from _sets_alone(run)
    if not run.apart:  # else each is told where it is read
        yield Check("texts", lambda: _names_of_texts(run))
    yield Check("model", lambda: _model(run))
    model = run.model
    if model is None:
        return
    if run.config.expert_group and not run.measure_only:
        yield Check("experts", lambda: _experts(run, model))
    yield Check("weights", lambda: _weights(run, model))
    yield Check("schemes", lambda: patterns(run, model))
    yield from groups(run, model)
    if "groups" in run.passed:
        if run.form is not None:
            yield from shapes(run, model, run.form)
        yield Check("ingredients", lambda: _ingredients(run, model))
    if run.config.tta:
        yield Check("evaluation", lambda: _adaptation(run, model))
    yield Check("device", lambda: _device(run, model))
    if needs := of_whole_model(run):
        yield Check("whole model", lambda: whole_model(run, model, needs))
    yield from _sets(run, model)
    if not run.measure_only:
        yield Check("statistics", lambda: _statistics(run))
        yield Check("calibration", lambda: _calibration(run, model))
    yield Check("calibration", lambda: _learned_texts(run))
    scheme = run.config.vision_quantization
    if scheme is not None:
        yield Check("vision tower", lambda: _tower(run, model, scheme))


def _settings_of_measures(run: Prospect) -> Iterator[Said]:
    check_measures(run.config.measuring, bool(run.config.compare))
    require_base(run.config)
    yield from ()


def _names_of_texts(run: Prospect) -> Iterator[Said]:
    """Refuse a mistyped one before the model is opened, which of a GGUF file takes a while."""
    config, sources = run.config, run.config.group(Sources)
    require_known_texts(config.measuring, sources)
    if not run.measure_only and run.own_data is None:
        require_known_sets(config.group(Calibrating).dataset, sources.data_folder)
    yield from ()


def _format(run: Prospect) -> Iterator[Said]:
    """Which format; how the target, or each runtime that loads it, takes the scheme in it."""
    config, plan = run.config, run.plan
    named = (config.target, config.format) if not run.measure_only else ()
    if config.save_dir is None and not any(named):
        yield Said("none: no --save_dir and no --target")
        return
    form = run.form = choose_format(plan, config.format, config.target)
    yield Said(form.name + ("" if config.target is None else f", which {config.target} loads"))
    asked = config.format not in (None, AUTO) or config.target is not None
    if form.name == NATIVE and not asked:
        yield Said(why_native(plan), "warning", f"format: {why_native(plan)}")
        return
    for exact, text in verdicts(form, plan.schemes, config.target):
        state: State = "ok" if exact else "warning"
        yield Said(text, state, f"{form.name}: {text}", "runtime")
    if config.target is not None:
        for note in loading_of(form, plan.schemes, config.target).notes:
            yield Said(note, "warning", what="runtime")


def _repository(run: Prospect) -> Iterator[Said]:
    """That the checkpoint may be pushed where it is to go."""
    name, config = run.config.push_to_hub, run.config
    assert name is not None
    if config.save_dir is None:
        raise LRQuantError(f"--push-to-hub {name}: there is no checkpoint; give --save-dir DIR")
    yield Said(f"goes to {require_repository(name, config.overwrite)} on the hub")


def _model(run: Prospect) -> Iterator[Said]:
    """What is to be known of the model, its weights and its tokenizer."""
    model = run.model = run.model or load_model(
        run.config.model, optional_path(run.config.cache_dir)
    )
    text = f"{model.architecture.name}, {len(model.blocks)} blocks"
    yield Said(f"{text}, {model.parameters / 1e6:.1f} M parameters")
    packed, strange = model.source.unpacked_from(), strange_tokenizer(model)
    if packed:
        text = f"unpacked from {packed}: full precision is that of these"
        yield Said(text, "warning", what="weights")
    if strange is not None:
        yield Said(strange, "warning", strange, "tokenizer")


def _experts(run: Prospect, model: Model) -> Iterator[Said]:
    if not model.has_experts:
        asked = f"--expert_group {run.config.expert_group}"
        raise LRQuantError(f"{asked}: no block of {model.name} has experts; leave it out")
    yield from ()


def _weights(run: Prospect, model: Model) -> Iterator[Said]:
    form = run.form
    require_finite(model, None if form is None else checkpoint_dtype(model, run.plan, form))
    yield from ()


def _ingredients(run: Prospect, model: Model) -> Iterator[Said]:
    check_ingredients(model, run.plan)
    yield from ()


def _device(run: Prospect, model: Model) -> Iterator[Said]:
    computing, scratch = run.config.group(Computing), Path(run.config.output_dir)
    bench = make_workbench(model, run.plan, computing, scratch)
    text = f"matrix products in {dtype_name(bench.dtype)} on {bench.device}"
    yield Said(text, logged=text)
    if bench.device.type == "cuda" and computing.deterministic and not bench.deterministic:
        text = "two runs differ in their last digits: CUDA adds up along tokens otherwise each time"
        yield Said(text, "warning", text)
    learning, samples = run.config.group(Learning), run.config.nsamples
    epochs = 0 if run.measure_only else learning.epochs
    if epochs and run.plan.of_blocks.ingredients:
        asked = computing.compile, bench.device, model, run.plan.of_blocks, learning, samples
        compiled, why = compiling(*asked)
        bench = replace(bench, compiled=compiled)
        yield Said(why, logged=why if compiled else "")
    run.workbench = bench


def _statistics(run: Prospect) -> Iterator[Said]:
    files = run.config.group(StatisticsFiles)
    run.statistics = given_statistics(files, run.plan.reads_statistics)
    yield from ()


def _calibration(run: Prospect, model: Model) -> Iterator[Said]:
    calibrating, sources = run.config.group(Calibrating), run.config.group(Sources)
    if run.own_data is None and written_by_the_model(calibrating.dataset):
        if run.apart or run.workbench is None:
            yield Said(f"{calibrating.dataset}: written before learning; {NOT_ESTIMATED}")
            return
        run.writer = OwnText(run.workbench, _texts_kept(run.config.resume))
    writer = run.writer
    calibration = calibration_of(calibrating, sources, model, run.own_data, writer)
    for each in run.plan.ingredients:
        if isinstance(each, Tuning):
            drawn = calibrating, sources, model, run.own_data, each.tune_nsamples
            run.tuning = tuning_samples_of(*drawn, writer)
            check_samples(len(run.tuning.feed))
    if writer is not None:
        writer.release()
    run.calibration = calibration
    text = calibration.description
    yield Said(text, logged=f"calibration {text}")
    if run.tuning is not None:
        text = f"end to end: {run.tuning.description}"
        yield Said(text, logged=f"calibration {text}")


def _learned_texts(run: Prospect) -> Iterator[Said]:
    """Texts of which a part is learned from that are measured on too."""
    learned = run.learned_texts
    measured = run.texts if run.reading is None else run.reading.texts
    for name, samples in measured.items():
        if samples.texts & learned:
            which = "" if samples.split == "file" else f", its {samples.split} split"
            text = (
                f"{name}: measured on text that is learned from{which}, so it will look better "
                "than others do; measure another set too"
            )
            yield Said(text, "warning", text)


def _texts_kept(resume: str | None) -> dict[str, Tensor]:
    """What the model wrote for the run that is gone on with."""
    return {} if resume is None else RunFolder.open(Path(resume)).written_texts()


def _tower(run: Prospect, model: Model, scheme: Scheme) -> Iterator[Said]:
    """Whether the vision tower can have its scheme, and pictures to learn on."""
    tower, plan = model.require_tower(), run.plan.tower
    check_grids(tower, plan)
    check_ingredients(tower, plan)
    if run.calibration is not None:
        require_pictures(run.calibration.feed, run.config.vision_scheme or scheme.name)
    yield Said(f"{len(tower.blocks)} blocks at {scheme.name}")


def _sets_alone(run: Prospect) -> Iterator[Check]:
    """The sets that need no model."""
    if not run.apart:
        yield Check("evaluation", lambda: _evaluation(run))
        return
    for measure in module_measures():
        for settings in measure.set_by_set(run.config.measuring[measure.settings]):
            yield Check("evaluation", partial(_read, run, measure, settings, None))


def _evaluation(run: Prospect) -> Iterator[Said]:
    run.evaluation = Evaluation(run.config)
    yield from ()


def _sets(run: Prospect, model: Model) -> Iterator[Check]:
    """The texts and sets that become a model's inputs."""
    if not run.apart:
        yield Check("evaluation", lambda: _reading(run, model))
        return
    texts = texts_of(run.config.measuring)
    apart = [[text] for text in texts if text.needed]
    apart.append([text for text in texts if not text.needed])
    for group in filter(None, apart):
        yield Check("evaluation", partial(_texts, run, model, group))
    for measure in module_measures():
        for settings in measure.set_by_set(run.config.measuring[measure.settings]):
            yield Check("evaluation", partial(_read, run, measure, settings, model))


def _reading(run: Prospect, model: Model) -> Iterator[Said]:
    assert run.evaluation is not None
    run.reading = run.evaluation.read(model)
    yield from ()


def _texts(run: Prospect, model: Model, group: list[AskedText]) -> Iterator[Said]:
    texts = read_texts(group, run.config.group(Sources), model)
    run.texts |= texts
    for samples in texts.values():
        yield Said(samples.description)
    missing = [text.name for text in group if text.name not in texts]
    if missing:
        yield Said(f"left out: {', '.join(missing)}", "warning")


def _read(
    run: Prospect, measure: AnyModule, settings: object, model: Model | None
) -> Iterator[Said]:
    sources = run.config.group(Sources)
    if model is None:
        sets = measure.read_alone(settings, sources)
    else:
        sets = measure.read(settings, sources, model)
    for asked in sets.values():
        yield Said(f"{measure.described(asked)}; {NOT_ESTIMATED}")


def _adaptation(run: Prospect, model: Model) -> Iterator[Said]:
    texts = [text.name for text in texts_of(run.config.measuring)]
    adapting, learned = run.config.group(Adapting), run.plan.ingredients
    check_adaptation(adapting, learned, texts, len(model.blocks), takes_pictures(model))
    yield Said(f"adapting the last {adapting.blocks} blocks to each")
