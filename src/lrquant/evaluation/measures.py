"""All measures of one run: perplexities and tasks, of the learned model and beside it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lrquant.blocks import BlockInputs, Head
from lrquant.config import Config
from lrquant.data import Samples, perplexity_windows
from lrquant.errors import LRQuantError
from lrquant.evaluation.adaptation import adapt, check_adaptation, is_adapted
from lrquant.evaluation.comparison import TaskBoard
from lrquant.evaluation.perplexity import PreparedBlock, score, send_through
from lrquant.learn.view import Method
from lrquant.materialize import materialize
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
    check_adaptation(config, len(model.blocks))
    return read_texts(config, model.tokenizer)


def read_texts(config: Config, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Samples]:
    """Every text that will be scored, in windows of one model's tokens."""
    if not config.perplexity_sets:
        return {}
    if tokenizer is None:
        raise LRQuantError("no tokenizer: perplexity needs one")
    found: dict[str, Samples] = {}
    missing: list[LRQuantError] = []
    for name in config.perplexity_sets:
        try:
            found[name] = perplexity_windows(
                name,
                tokenizer,
                config.seqlen,
                config.limit,
                Path(config.data_dir) if config.data_dir else None,
                Path(config.cache_dir) if config.cache_dir else None,
            )
        except LRQuantError as error:
            if config.ppl or name in config.agreement:
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
    board: TaskBoard | None = None,
) -> Iterator[dict[str, Any]]:
    """Measures of the learned model, and with `compare` of full precision and round-to-nearest.

    Each set's measures come when they are done, the tasks of `board` last, so that none is lost
    with another.
    """
    folder.require_finished()
    quantized = preparer(workbench, config.quantization, config, folder)
    for name, windows in texts.items():
        variants: dict[str, Callable[[int], PreparedBlock]] = {}
        if config.compare is True or name in config.agreement:
            variants["full_precision"] = preparer(workbench, FLOATING_POINT)
        if config.compare is True:
            variants["round_to_nearest"] = preparer(workbench, config.quantization)
        variants["quantized"] = quantized
        if config.tta:
            done = adapt(workbench, config, folder, windows, progress)
            yield {"test_time_adaptation": {name: done}}
            variants["test_time_adapted"] = preparer(
                workbench, config.quantization, config, folder, name
            )
        yield measure(workbench, windows, variants, progress, agreement=name in config.agreement)
    if board is not None:
        scored = {"quantized": quantized}
        if config.compare is True:
            scored["full_precision"] = preparer(workbench, FLOATING_POINT)
            scored["round_to_nearest"] = preparer(workbench, config.quantization)
        for variant, prepare in scored.items():
            yield board.add(variant, materialize(workbench, prepare), workbench.model.tokenizer)


def measure(
    workbench: Workbench,
    windows: Samples,
    variants: dict[str, Callable[[int], PreparedBlock]],
    progress: Progress,
    *,
    agreement: bool = False,
) -> dict[str, Any]:
    """Perplexity of each variant of the model on one set of windows.

    With `agreement` also that of the others' next-token distributions with those of the first
    variant, the full-precision model, whose final hidden states alone are kept.
    """
    logger.info("perplexity on %s", windows.description)
    model = workbench.model
    entry = entry_of(workbench, windows)
    stream, *kept = workbench.streams(entry, 2 if agreement else 1)
    head = Head(model, workbench.device, workbench.dtype)
    perplexities: dict[str, Any] = {"text": windows.description}
    agreements: dict[str, Any] = {"text": windows.description}
    for index, (variant, prepare) in enumerate(variants.items()):
        with progress.measuring(f"{windows.name} {variant}", len(model.blocks)) as told:
            send_through(model, prepare, stream, entry, told)
            scores = score(head, stream, windows.ids, kept[0] if kept and index else None)
        if kept and not index:
            kept[0].copy(stream)
        log_scores(windows.name, variant, scores)
        perplexities[variant] = scores.pop("perplexity")
        if scores:
            agreements[variant] = scores
    results: dict[str, Any] = {"perplexity": {windows.name: perplexities}}
    return results | ({"agreement": {windows.name: agreements}} if agreement else {})


def entry_of(workbench: Workbench, windows: Samples) -> BlockInputs:
    """What goes into the first block, in batches of `EVALUATION_TOKENS`."""
    size = max(1, EVALUATION_TOKENS // windows.ids.shape[1])
    return BlockInputs(workbench.model, windows.ids, size, workbench.device)


def log_scores(text: str, variant: str, scores: dict[str, Any]) -> None:
    """Say what `score` found."""
    shown = (key for key in scores if key not in ("perplexity", "positions"))
    words = ", ".join(f"{key} {scores[key]:.4g}" for key in shown)
    logger.info(
        "%s perplexity, %s: %.4f%s",
        *(text, variant.replace("_", " "), scores["perplexity"]),
        f"; {words}" if words else "",
    )


def preparer(
    workbench: Workbench,
    scheme: Scheme,
    config: Config | None = None,
    folder: RunFolder | None = None,
    adapted: str | None = None,
) -> Callable[[int], PreparedBlock]:
    """How block i is made ready: under `scheme` alone, or as a run learned it.

    `adapted` names the text to which the last blocks' parameters were adapted.
    """

    @torch.no_grad()
    def prepare(index: int) -> PreparedBlock:
        if config is not None and folder is not None:
            here = adapted if is_adapted(config, index, len(workbench.model.blocks)) else None
            view = learned_view(workbench, config, folder, index, here)
        else:
            view = workbench.view(index, workbench.stored(index), scheme, Method())
        return PreparedBlock(workbench.runner(index, view), view.freeze().tensors(view.dtype))

    return prepare
