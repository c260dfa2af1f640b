"""The pre-flight: whether a model, a scheme and a runtime go together, and what a run will need."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch import Tensor

from lrquant.blocks import BlockInputs
from lrquant.config import Config
from lrquant.data import Samples
from lrquant.errors import LRQuantError
from lrquant.estimate import (
    CheckpointSize,
    Memory,
    Seconds,
    checkpoint_size,
    estimate_memory,
    learning_seconds,
    measuring_seconds,
    run_bytes,
    stream_bytes,
)
from lrquant.evaluation.adaptation import check_adaptation
from lrquant.evaluation.measures import prepare_evaluation
from lrquant.evaluation.subject import check_comparison
from lrquant.evaluation.zero_shot import load_tasks
from lrquant.export import Format, Loading, choose_format
from lrquant.export.checkpoint import check_format, check_target
from lrquant.identity import describe_run, dtype_name
from lrquant.model import Model, load_model
from lrquant.pipeline import calibration_of, given_statistics, resolve_settings
from lrquant.probe import BlockCosts, probe_block
from lrquant.scheme import FLOAT_BITS
from lrquant.workbench import Workbench, block_shapes, make_workbench
from lrquant.workdir import RunFolder

logger = logging.getLogger("lrquant")
State = Literal["ok", "warning", "failed", "not checked"]
_OF_A_RUN = {"config.yaml", "run.json", "run.log", "blocks", "blocks.jsonl", "results.json"}
_OF_A_RUN |= {"adapted"}
_NARROW = 0.9  # of the memory or disk that is free, from which on a need is warned of


@dataclass(frozen=True)
class Finding:
    """One check's outcome, in a sentence."""

    what: str
    state: State
    text: str


@dataclass
class Preflight:
    """All findings, in the order of the checks, and the estimates that could be made."""

    config: Config
    findings: list[Finding] = field(default_factory=list)
    checkpoint: CheckpointSize | None = None
    run_bytes: int | None = None
    stream_bytes: int | None = None
    memory: Memory | None = None
    costs: BlockCosts | None = None
    seconds: Seconds | None = None

    @property
    def failed(self) -> list[Finding]:
        """The checks that a run would not get through."""
        return [finding for finding in self.findings if finding.state == "failed"]

    def add(self, what: str, state: State, text: str) -> None:
        """Note one finding."""
        self.findings.append(Finding(what, state, text))

    @contextmanager
    def checking(self, what: str) -> Iterator[None]:
        """Turn an error into a finding: the checks after it still run."""
        try:
            yield
        except LRQuantError as error:
            self.add(what, "failed", str(error))
        except OSError as error:
            where = f": {error.filename}" if error.filename else ""
            self.add(what, "failed", f"{error.strerror or error}{where}")


def preflight(
    settings: dict[str, Any], model: Model | None = None, samples: Tensor | None = None
) -> Preflight:
    """Check the run that `settings`, fields of `Config`, ask for, without starting it.

    Reads one block's weights, times a few steps of it and writes nothing.  Raises LRQuantError only
    for settings that contradict each other; all else is a finding.
    """
    config, measure_only = resolve_settings(settings)
    done = Preflight(config)
    form = _check_format(done)
    with done.checking("model"):
        model = model or load_model(config.model, _path(config.cache_dir))
        text = f"{model.architecture.name}, {len(model.blocks)} blocks, {_parameters(model):.1f} M"
        done.add("model", "ok", f"{text} parameters")
    if model is None:
        _check_places(done, None)
        done.add("all else", "not checked", "needs the model")
        return done
    shapes = _check_shapes(done, model, form)
    workbench = _check_device(done, model)
    calibration = None if measure_only else _check_calibration(done, model, samples)
    texts = _check_evaluation(done, model)
    finished = len(model.blocks) if measure_only else 0
    if not measure_only:
        finished = _check_run_folder(done, model, workbench, calibration)
    _check_places(done, model)
    if shapes and workbench is not None:
        _estimate(done, workbench, form, texts, finished)
    else:
        done.add("memory, disk, time", "not checked", "needs shapes that fit and a device")
    return done


def _check_format(done: Preflight) -> Format | None:
    """Which format; how the target takes the scheme in it."""
    config = done.config
    if config.save_dir is None and config.target is None and config.format is None:
        done.add("format", "ok", "none: no --save_dir and no --target")
        return None
    with done.checking("format"):
        form = choose_format(config)
        if config.target is None:
            done.add("format", "ok", form.name)
            return form
        done.add("format", "ok", f"{form.name}, which {config.target} loads")
        for note in form.loading(config.quantization, config.target).notes:
            done.add("runtime", "warning", note)
        return form
    return None


def _check_shapes(done: Preflight, model: Model, form: Format | None) -> bool:
    """Group sizes, kernels' sizes, fused modules, shifts, packing; whether the shapes fit."""
    config = done.config
    scheme = config.quantization
    view = block_shapes(model, dataclasses.replace(scheme, weight_bits=FLOAT_BITS))
    before = len(done.failed)
    for linear in model.linears if scheme.weight_bits != FLOAT_BITS else ():
        with done.checking("groups"):
            view.group_size(linear)
    fits = len(done.failed) == before
    if fits:
        per = f"groups of {scheme.group_size} divide" if scheme.group_size else "one scale a row of"
        done.add("groups", "ok", f"{per} all {len(model.linears)} linears")
    if form is None:
        return fits
    with done.checking("shifts"):
        check_format(model, config, form)
    if config.target is not None:
        sizes = {name: tuple(view.stored[f"{name}.weight"].shape) for name in model.linears}
        _check_kernels(done, form.loading(scheme, config.target), sizes)
        _check_fused(done, model, form)
    if fits:
        with done.checking("packing"):
            size = done.checkpoint = checkpoint_size(model, config, form)
            done.add("packing", "ok", f"{form.name}: {size.bits_per_weight:.3f} bits a weight")
            return True
    return False


def _check_kernels(done: Preflight, loading: Loading, sizes: dict[str, tuple[int, ...]]) -> None:
    """The sizes that a runtime's kernels ask for."""
    if loading.multiple == 1:
        return
    odd = [
        f"{name} ({size[1]} to {size[0]})"
        for name, size in sizes.items()
        if any(width % loading.multiple for width in size)
    ]
    if odd:
        text = f"{loading.where} needs in and out divisible by {loading.multiple}: not so in "
        done.add("kernels", "warning", text + ", ".join(odd))
    else:
        text = f"in and out of all linears divide by {loading.multiple}, for {loading.where}"
        done.add("kernels", "ok", text)


def _check_fused(done: Preflight, model: Model, form: Format) -> None:
    """Linears that read one norm are fused by runtimes, so that their scheme must be the same."""
    outside = form.quantization_config(done.config.quantization, [], []) or {}
    schemes = outside.get("config_groups") or {"all": None}
    sites = model.architecture.sites(model.skeleton.config)
    fused = [
        " + ".join(fold.module.rpartition(".")[2] for fold in site.consumers)
        for site in sites
        if site.kind == "norm"
    ]
    if fused and len(schemes) > 1:
        text = f"{form.name} writes {len(schemes)} schemes; make sure that none divides "
        done.add("fused", "warning", text + ", ".join(fused))
    elif fused:
        done.add("fused", "ok", f"one scheme for {', '.join(fused)}")


def _check_device(done: Preflight, model: Model) -> Workbench | None:
    with done.checking("device"):
        workbench = make_workbench(model, done.config)
        text = f"matrix products in {dtype_name(workbench.dtype)} on {workbench.device}"
        done.add("device", "ok", text)
        return workbench
    return None


def _check_calibration(done: Preflight, model: Model, samples: Tensor | None) -> Samples | None:
    """The calibration text, how long its samples may be, and given statistics."""
    with done.checking("statistics"):
        given_statistics(done.config)
    with done.checking("calibration"):
        calibration = calibration_of(done.config, model, samples)
        BlockInputs(model, calibration.ids, done.config.batch_size, torch.device("cpu"))
        done.add("calibration", "ok", calibration.description)
        return calibration
    return None


def _check_evaluation(done: Preflight, model: Model) -> list[Samples]:
    """Each text and task by itself, so that all that are missing are named."""
    config = done.config
    alone: dict[str, Any] = {"ppl": (), "agreement": (), "eval_ppl": False, "tasks": ""}
    alone |= {"tta": False}
    with done.checking("evaluation"):
        check_comparison(config)
    parts: list[dict[str, Any]] = [
        {"ppl": (name,)} for name in dict.fromkeys((*config.ppl, *config.agreement))
    ]
    parts += [{"eval_ppl": True}] if config.eval_ppl and not config.ppl else []
    parts += [{"tasks": name.strip()} for name in config.tasks.split(",") if name.strip()]
    found: dict[str, Samples] = {}
    for part in parts:
        with done.checking("evaluation"):
            wanted = dataclasses.replace(config, **{**alone, **part})
            tasks = load_tasks(wanted)
            texts = prepare_evaluation(wanted, model)
            for text in texts.values():
                BlockInputs(model, text.ids, 1, torch.device("cpu"))
                done.add("evaluation", "ok", text.description)
            found |= texts
            missing = [name for name in wanted.perplexity_sets if name not in texts]
            if missing:
                done.add("evaluation", "warning", f"left out: {', '.join(missing)}")
            if tasks is not None:
                said = f"task {wanted.tasks}"
                said += "".join(f", {tasks.sets[n]}" for n in tasks.names if n in tasks.sets)
                done.add("evaluation", "ok", f"{said}; its time is not estimated")
    if config.tta:
        with done.checking("evaluation"):
            check_adaptation(config, len(model.blocks))
            done.add("evaluation", "ok", f"adapting the last {config.tta_blocks} blocks to each")
    return list(found.values())


def _check_run_folder(
    done: Preflight, model: Model, workbench: Workbench | None, calibration: Samples | None
) -> int:
    """Whether the run may start or go on in its folder; how many blocks are finished."""
    config = done.config
    if config.resume is None:
        with done.checking("run folder"):
            RunFolder(Path(config.output_dir)).require_replaceable(config)
        return 0
    with done.checking("run folder"):
        folder = RunFolder.open(Path(config.resume))
        if folder.path.resolve() != Path(config.output_dir).resolve():
            RunFolder(Path(config.output_dir)).require_replaceable(config)
        if workbench is not None and calibration is not None:
            folder.require_same(describe_run(config, model, workbench, calibration))
        finished = folder.finished_blocks()
        done.add("run folder", "ok", f"{finished} of {len(model.blocks)} blocks are learned")
        return finished
    return 0


def _check_places(done: Preflight, model: Model | None) -> None:
    """Whether the output places can be written, and hold nothing that a run would delete."""
    config = done.config
    output = Path(config.output_dir)
    with done.checking("output_dir"):
        _require_writable(output, "--output_dir")
        others = sorted({p.name for p in output.iterdir()} - _OF_A_RUN) if output.is_dir() else []
        if others:
            named = ", ".join(others[:3]) + (", …" if others[3:] else "")
            done.add("output_dir", "warning", f"{output} holds other files, which stay: {named}")
        else:
            done.add("output_dir", "ok", f"{output} can be written")
    if config.save_dir is not None:
        with done.checking("save_dir"):
            if model is not None:
                check_target(model, config, Path(config.save_dir))
            _require_writable(Path(config.save_dir).resolve().parent, "--save_dir")
            done.add("save_dir", "ok", f"{config.save_dir} can be written")


def _require_writable(path: Path, flag: str) -> None:
    place = _existing(path)
    if not place.is_dir():
        raise LRQuantError(f"{flag} {path}: {place} is a file; use another folder")
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise LRQuantError(
            f"{flag} {path}: {place} cannot be written ({error.strerror}); use another folder"
        ) from error


def _existing(path: Path) -> Path:
    """The path, or the nearest of its parents that exists."""
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path


def _estimate(
    done: Preflight,
    workbench: Workbench,
    form: Format | None,
    texts: list[Samples],
    finished: int,
) -> None:
    """Measure one block, and hold memory, disk and time against what there is."""
    config, model = done.config, workbench.model
    shape = config.nsamples, config.seqlen, model.skeleton.config.hidden_size
    count = 3 if config.two_branch else 2
    done.stream_bytes = stream_bytes(*shape, workbench.dtype, count)
    place = workbench.place(done.stream_bytes)
    on_disk = done.stream_bytes if place == "disk" else 0
    with done.checking("disk"):
        done.run_bytes = run_bytes(model, config)
        _check_disk(done, on_disk)
    with done.checking("memory"):
        costs = done.costs = probe_block(workbench, config)
        blocks = len(model.blocks)
        done.seconds = Seconds(
            learning_seconds(config, costs, blocks, finished) if finished < blocks else 0.0,
            measuring_seconds(model, config, costs, texts),
        )
        held = psutil.Process().memory_info().rss
        cuda = workbench.device.type == "cuda"
        inside = place == ("device" if cuda else "host") or (place == "device" and not cuda)
        done.memory = estimate_memory(
            model, config, costs, 0 if cuda else held, workbench.dtype, inside, texts
        )
        free = psutil.virtual_memory().available + held
        if cuda:
            free = torch.cuda.mem_get_info(workbench.device)[0]
        _against(done, "memory", done.memory.peak, free, f"on {workbench.device}")


def _check_disk(done: Preflight, streams: int) -> None:
    """Run folder, hidden states on disk and checkpoint against the space where they go."""
    config = done.config
    needs = {Path(config.output_dir): (done.run_bytes or 0) + streams}
    if config.save_dir is not None and done.checkpoint is not None:
        needs[Path(config.save_dir)] = done.checkpoint.total
    by_device: dict[int, tuple[int, Path]] = {}
    for path, size in needs.items():
        place = _existing(path)
        before, _ = by_device.get(place.stat().st_dev, (0, place))
        by_device[place.stat().st_dev] = before + size, place
    for size, place in by_device.values():
        _against(done, "disk", size, shutil.disk_usage(place).free, f"under {place}")


def _against(done: Preflight, what: str, need: int, free: int, where: str) -> None:
    text = f"about {need / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free {where}"
    if need > free:
        done.add(what, "failed", f"{text}: {_MENDS[what]}")
    else:
        done.add(what, "warning" if need > _NARROW * free else "ok", text)


_MENDS = {
    "memory": "use --offload disk, fewer or shorter samples, or a smaller --batch_size",
    "disk": "free some space, or use another --output_dir or --save_dir",
}


def _parameters(model: Model) -> float:
    """Parameters in millions, tied ones once."""
    return sum(tensor.numel() for tensor in model.skeleton.parameters()) / 1e6


def _path(value: str | None) -> Path | None:
    return None if value is None else Path(value)
