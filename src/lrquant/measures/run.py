"""All measures of one run: perplexities and tasks, of the learned model and beside it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrquant.blocks.head import Head
from lrquant.blocks.inputs import BlockInputs
from lrquant.blocks.materialize import materialize
from lrquant.blocks.runner import Variant
from lrquant.blocks.variants import as_learned, full_precision, unlearned
from lrquant.blocks.workbench import Workbench
from lrquant.config.config import Config
from lrquant.data.beginnings import beginning_of
from lrquant.data.conversations import is_conversations
from lrquant.data.prompts import Reader, picture_samples, takes_pictures
from lrquant.data.samples import Samples, perplexity_windows
from lrquant.data.vocabulary import require_known_tokens
from lrquant.errors import LRQuantError
from lrquant.learn.adaptation import adapt, check_adaptation, describe_adaptation
from lrquant.measures.classification import LabelledPictures, accuracy, predictions, read_pictures
from lrquant.measures.comparison import TaskBoard
from lrquant.measures.perplexity import score, send_through
from lrquant.measures.shares import counted
from lrquant.measures.vqa import Questions, answer_all, read_questions
from lrquant.model.model import Model
from lrquant.runs.folder import RunFolder
from lrquant.runs.progress import Progress

logger = logging.getLogger("lrquant")
EVALUATION_TOKENS = 2048  # tokens of one forward, in windows


@dataclass(frozen=True)
class Evaluation:
    """What a run is measured on, read before any hour is spent."""

    texts: dict[str, Samples]
    questions: dict[str, Questions]
    pictures: LabelledPictures | None = None


def prepare_evaluation(config: Config, model: Model) -> Evaluation:
    """Read every text, question and picture that will be scored.

    Sets asked for by name must be there; of the published five, those that can't be had are named
    in the log and left out, as long as one is left.
    """
    check_adaptation(config, len(model.blocks), takes_pictures(model))
    return Evaluation(
        read_texts(config, model), read_questions(config, model), read_pictures(config, model)
    )


def read_texts(config: Config, reader: Reader) -> dict[str, Samples]:
    """Every text that will be scored: windows of one model's tokens, or conversations (.jsonl)."""
    if not config.perplexity_sets:
        return {}
    if reader.tokenizer is None:
        raise LRQuantError("no tokenizer: perplexity needs one")
    model_type = reader.architecture.part(reader.skeleton.config).model_type
    found: dict[str, Samples] = {}
    missing: list[LRQuantError] = []
    for name in config.perplexity_sets:
        if is_conversations(Path(name)) and takes_pictures(reader):
            found[name] = picture_samples(Path(name), reader, config.limit)
            continue
        try:
            found[name] = perplexity_windows(
                name,
                reader.tokenizer,
                config.seqlen,
                config.limit,
                Path(config.data_dir) if config.data_dir else None,
                Path(config.cache_dir) if config.cache_dir else None,
                beginning_of(reader.tokenizer, model_type, config.bos),
                config.text_column,
            )
        except LRQuantError as error:
            if config.ppl or name in config.agreement:
                raise
            missing.append(error)
            logger.warning("perplexity on %s is left out: %s", name, error)
    if missing and not found:
        raise missing[0]
    for name, text in found.items():
        require_known_tokens(text.feed, name, reader)
    return found


def evaluate_run(
    workbench: Workbench,
    config: Config,
    folder: RunFolder,
    evaluation: Evaluation,
    progress: Progress,
    board: TaskBoard | None = None,
) -> Iterator[dict[str, Any]]:
    """Measures of the learned model, and with `compare` of full precision and round-to-nearest.

    Each set's measures come when they are done, questions about pictures and the tasks of `board`
    last, so that none is lost with another.
    """
    folder.require_finished()
    quantized = as_learned(workbench, folder)
    nearest = unlearned(workbench)
    for name, windows in evaluation.texts.items():
        variants: dict[str, Variant] = {}
        if config.compare is True or name in config.agreement:
            variants["full_precision"] = full_precision(workbench)
        if config.compare is True:
            variants["round_to_nearest"] = nearest
        variants["quantized"] = quantized
        if config.tta:
            done = adapt(workbench, config, folder, windows, progress)
            how = {"adapted": describe_adaptation(config)}
            yield {"test_time_adaptation": {name: measured_on(windows) | how | done}}
            variants["test_time_adapted"] = as_learned(workbench, folder, name, config.tta_blocks)
        measured = measure(
            workbench, windows, variants, progress, agreement=name in config.agreement
        )
        for kind in measured if config.tta else ():
            measured[kind][name] |= how
        yield measured
    pictures, questions = evaluation.pictures, evaluation.questions
    if board is None and pictures is None and not questions:
        return
    scored = {"quantized": quantized}
    if config.compare is True or pictures is not None:
        scored["full_precision"] = full_precision(workbench)
    if config.compare is True:
        scored["round_to_nearest"] = nearest
    model, classes = workbench.model, {}
    for variant, prepare in scored.items():
        module = materialize(workbench, prepare)
        if pictures is not None:
            classes[variant] = predictions(pictures, module, variant, progress)
        yield from answer_all(questions, module, model, variant, progress)
        if board is not None:
            yield board.add(variant, module, model)
    if pictures is not None:
        expected = classes["full_precision"]
        right = {variant: accuracy(pictures, found, expected) for variant, found in classes.items()}
        for variant, share in right.items():
            words = "%s: %.4f of the classes are right, %s"
            logger.info(words, variant, share["accuracy"], pictures.description)
        yield {"classification": {**pictures.about, **right}}


def measure(
    workbench: Workbench,
    windows: Samples,
    variants: dict[str, Variant],
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
    perplexities: dict[str, Any] = measured_on(windows)
    agreements: dict[str, Any] = measured_on(windows)
    for index, (variant, prepare) in enumerate(variants.items()):
        with progress.measuring(f"{windows.name} {variant}", len(model.blocks)) as told:
            send_through(model, prepare, stream, entry, told)
            scores = score(head, stream, entry.feed, kept[0] if kept and index else None)
        if kept and not index:
            kept[0].copy(stream)
        log_scores(windows.name, variant, scores)
        perplexities[variant] = scores.pop("perplexity")
        if scores:
            agreements[variant] = scores
    results: dict[str, Any] = {"perplexity": {windows.name: perplexities}}
    return results | ({"agreement": {windows.name: agreements}} if agreement else {})


def measured_on(windows: Samples) -> dict[str, Any]:
    """Of what a perplexity or an agreement is, as results.json has it."""
    unit = "conversations"
    if windows.prompts is None:
        unit = f"windows of {windows.ids.shape[1]} tokens"
    items = counted(len(windows.feed), windows.whole, unit)
    return {"text": windows.description, "sha256": windows.sha256, "items": items}


def entry_of(workbench: Workbench, windows: Samples) -> BlockInputs:
    """What goes into the first block: text in batches of `EVALUATION_TOKENS`, pictures singly."""
    size = 1
    if windows.prompts is None:
        size = max(1, EVALUATION_TOKENS // windows.ids.shape[1])
    return BlockInputs(workbench.model, windows.feed, size, workbench.device)


def log_scores(text: str, variant: str, scores: dict[str, Any]) -> None:
    """Say what `score` found."""
    shown = (key for key in scores if key not in ("perplexity", "positions"))
    words = ", ".join(f"{key} {scores[key]:.4g}" for key in shown)
    logger.info(
        "%s perplexity, %s: %.4f%s",
        *(text, variant.replace("_", " "), scores["perplexity"]),
        f"; {words}" if words else "",
    )
