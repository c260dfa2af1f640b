"""All measures of one run: perplexities and tasks, of the learned model and beside it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from lrquant.blocks import BlockInputs
from lrquant.config import Config
from lrquant.data import Samples, perplexity_windows
from lrquant.errors import LRQuantError
from lrquant.evaluation.perplexity import PreparedBlock, perplexity
from lrquant.evaluation.zero_shot import check_tasks, evaluate_tasks
from lrquant.learn.view import Method
from lrquant.model import Model
from lrquant.progress import Progress
from lrquant.scheme import FLOATING_POINT, Scheme
from lrquant.workbench import Workbench, learned_view
from lrquant.workdir import RunFolder

logger = logging.getLogger("lrquant")
EVALUATION_TOKENS = 2048  # tokens of one forward, in windows


def prepare_evaluation(config: Config, model: Model) -> dict[str, Samples]:
    """Read every text that will be scored, before any hour is spent.

    Sets asked for by name must be there; of the published five, those that can't be had are named
    in the log and left out, as long as one is left.
    """
    if config.tasks:
        check_tasks(config.tasks)
    if not config.perplexity_sets:
        return {}
    if model.tokenizer is None:
        raise LRQuantError("no tokenizer: perplexity needs one")
    found: dict[str, Samples] = {}
    missing: list[LRQuantError] = []
    for name in config.perplexity_sets:
        try:
            found[name] = perplexity_windows(
                name,
                model.tokenizer,
                config.seqlen,
                config.limit,
                Path(config.data_dir) if config.data_dir else None,
                Path(config.cache_dir) if config.cache_dir else None,
            )
        except LRQuantError as error:
            if config.ppl:
                raise
            missing.append(error)
            logger.warning("perplexity on %s is left out: %s", name, error)
    if missing and not found:
        raise missing[0]
    return found


def evaluate_run(
    workbench: Workbench,
    config: Config,
    folder: RunFolder,
    texts: dict[str, Samples],
    progress: Progress,
) -> Iterator[dict[str, Any]]:
    """Measures of the learned model, and with `compare` of full precision and round-to-nearest.

    Perplexities come first, tasks when they are done, so that neither is lost with the other.
    """
    blocks = len(workbench.model.blocks)
    if folder.finished_blocks() < blocks:
        raise LRQuantError(
            f"run folder {folder.path}: {folder.finished_blocks()} of {blocks} blocks are "
            "finished; go on with --resume and the run's own --epochs first"
        )
    variants: dict[str, Callable[[int], PreparedBlock]] = {}
    if config.compare:
        variants["full_precision"] = preparer(workbench, FLOATING_POINT)
        variants["round_to_nearest"] = preparer(workbench, config.quantization)
    quantized = preparer(workbench, config.quantization, config, folder)
    variants["quantized"] = quantized
    yield _perplexities(workbench, texts, variants, progress)
    if config.tasks:
        yield {"tasks": evaluate_tasks(workbench, quantized, config)}


def evaluate_model(
    workbench: Workbench, config: Config, texts: dict[str, Samples], progress: Progress
) -> dict[str, Any]:
    """Measures of the model itself, in floating point."""
    prepare = preparer(workbench, FLOATING_POINT)
    results = _perplexities(workbench, texts, {"full_precision": prepare}, progress)
    if config.tasks:
        results["tasks"] = evaluate_tasks(workbench, prepare, config)
    return results


def _perplexities(
    workbench: Workbench,
    texts: dict[str, Samples],
    variants: dict[str, Callable[[int], PreparedBlock]],
    progress: Progress,
) -> dict[str, Any]:
    scores: dict[str, Any] = {}
    for name, windows in texts.items():
        logger.info("perplexity on %s", windows.description)
        measured = measure_perplexity(workbench, name, windows, variants, progress)
        scores[name] = {"text": windows.description, **measured}
    return {"perplexity": scores}


def measure_perplexity(
    workbench: Workbench,
    name: str,
    windows: Samples,
    variants: dict[str, Callable[[int], PreparedBlock]],
    progress: Progress,
) -> dict[str, float]:
    """Perplexity of each variant of the model on one set of windows."""
    model = workbench.model
    batch_size = max(1, EVALUATION_TOKENS // windows.ids.shape[1])
    entry = BlockInputs(model, windows.ids, batch_size, workbench.device)
    (stream,) = workbench.streams(entry, 1)
    scores = {}
    for variant, prepare in variants.items():
        with progress.measuring(f"{name} {variant}", len(model.blocks)) as told:
            scores[variant] = perplexity(
                model, prepare, windows.ids, stream, entry, workbench.dtype, told
            )
        logger.info("%s perplexity, %s: %.4f", name, variant.replace("_", " "), scores[variant])
    return scores


def preparer(
    workbench: Workbench,
    scheme: Scheme,
    config: Config | None = None,
    folder: RunFolder | None = None,
) -> Callable[[int], PreparedBlock]:
    """How block i is made ready: under `scheme` alone, or as a run learned it."""

    @torch.no_grad()
    def prepare(index: int) -> PreparedBlock:
        if config is not None and folder is not None:
            view = learned_view(workbench, config, folder, index)
        else:
            view = workbench.view(index, workbench.stored(index), scheme, Method())
        return PreparedBlock(workbench.runner(index, view), view.freeze().tensors(view.dtype))

    return prepare
