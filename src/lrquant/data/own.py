"""Calibration data of who calls: texts, conversations, rows, token ids, or batches of a loader."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice

import torch
from torch import Tensor

from lrquant.config.groups import Calibrating, Sources
from lrquant.data.beginnings import beginning_of
from lrquant.data.feeds import Feed, Inputs, has_pictures
from lrquant.data.rows import Documents, documents_of, rows_of
from lrquant.data.samples import Samples, token_samples
from lrquant.data.texts import Text
from lrquant.data.windows import TokenText, random_windows
from lrquant.errors import LRQuantError
from lrquant.model.model import Model

_NAME = "given"
_STREAMED = 10_000  # documents that are read of what has no length
_NO_INPUT = ("labels", "label")
_TAKEN = (
    "expected texts, conversations (lists of messages), rows of a data set, token ids (samples, "
    "tokens), or a loader of such"
)


@dataclass(frozen=True, eq=False)
class OwnData:
    """Documents to draw windows from, or samples to take as they are."""

    documents: Documents | None = None
    feed: Feed | None = None
    ids: Tensor | None = None


def own_data(value: object, most: int, column: str | None = None) -> OwnData:
    """What `calibration` holds; of what has no length, or is a loader, the first `most` samples.

    `column` is that of the text in rows.  Raises LRQuantError for data of another kind.
    """
    if isinstance(value, Feed):
        return OwnData(feed=value)
    if isinstance(value, Tensor):
        return OwnData(ids=_matrix(value))
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise LRQuantError(f"calibration of type {type(value).__name__}: {_TAKEN}")
    items = iter(value)
    first = next(items, None)
    if first is None:
        raise LRQuantError(f"calibration of type {type(value).__name__}: nothing in it; give some")
    items = chain([first], items)
    if _holds_tokens(first):
        samples = chain.from_iterable(map(_samples_of, items))
        kept = samples if isinstance(value, Sequence) else islice(samples, most)
        return _of_samples(list(kept))
    if isinstance(first, Mapping) and {"role", "content"} <= first.keys():
        items = iter([list(items)])  # one conversation alone
    elif not hasattr(value, "__len__"):
        items = islice(items, _STREAMED)
    return OwnData(documents=documents_of(rows_of(items, "calibration"), "calibration", column))


def own_samples(own: OwnData, asked: Calibrating, sources: Sources, model: Model) -> Samples:
    """Samples to learn on: as they were given, or windows drawn from documents as from a file."""
    if own.documents is not None:
        return _drawn(own.documents, asked, sources, model)
    if own.feed is not None:
        feed, empty = own.feed, torch.empty((0, 0), dtype=torch.int64)
        pictures = any(map(has_pictures, feed.inputs))
        text = f"given samples, {len(feed)}{' with pictures' if pictures else ''}"
        return Samples(empty, _NAME, _NAME, feed.sha256(), text, feed)
    assert own.ids is not None
    digest = hashlib.sha256(own.ids.numpy().tobytes()).hexdigest()
    text = f"given tokens, {len(own.ids)} x {own.ids.shape[1]} = {own.ids.numel()} tokens"
    return Samples(own.ids, _NAME, _NAME, digest, text)


def _drawn(documents: Documents, asked: Calibrating, sources: Sources, model: Model) -> Samples:
    if model.tokenizer is None:
        raise LRQuantError("no tokenizer: give one, or token ids as `calibration`")
    beginning = beginning_of(model.tokenizer, model.config.model_type, sources.bos)
    text = Text(_NAME, "file", documents.items, _NAME, documents.layout)
    tokens = TokenText(text, model.tokenizer, beginning)
    windows, note = random_windows(tokens, asked.count, sources.seqlen, asked.seed)
    said = f"{len(documents.items)} documents"
    label = text.label(said, tokens.layout, note, beginning.text)
    return token_samples(windows, _NAME, _NAME, label, asked.seed)


def _matrix(ids: Tensor) -> Tensor:
    """Token ids (samples, tokens), int64, on the host."""
    if ids.dim() != 2 or ids.dtype != torch.int64:
        raise LRQuantError(
            f"calibration of shape {tuple(ids.shape)} and {ids.dtype}: expected token ids "
            "(samples, tokens), int64"
        )
    if not ids.numel():
        raise LRQuantError(f"calibration of shape {tuple(ids.shape)}: no token in it; give some")
    return ids.cpu().contiguous()


def _holds_tokens(item: object) -> bool:
    """Whether an item is a sample, or a batch, of token ids."""
    if isinstance(item, Mapping):
        return "input_ids" in item
    if isinstance(item, list | tuple) and item:
        return isinstance(item[0], Tensor | int)
    return isinstance(item, Tensor)


def _samples_of(item: object) -> Iterator[Inputs]:
    """Samples of a row of token ids, of a batch of them, or of a batch by name."""
    if isinstance(item, Mapping):
        yield from _samples_by_name(item)
        return
    if isinstance(item, list | tuple) and item and isinstance(item[0], Tensor):
        item = item[0]  # as a loader of a TensorDataset gives them
    yield from ({"input_ids": row[None]} for row in _token_rows(item))


def _samples_by_name(batch: Mapping[str, object]) -> Iterator[Inputs]:
    """Samples without what is masked; those with pictures come one a batch, with all they have."""
    if "input_ids" not in batch:
        raise LRQuantError(f"calibration: a batch of {', '.join(batch)} has no input_ids; add them")
    rows = _token_rows(batch["input_ids"])
    if has_pictures({name: torch.empty(0) for name in batch}):
        if len(rows) != 1:
            raise LRQuantError(
                f"calibration: a batch of {len(rows)} samples with pictures; give batches of one"
            )
        tensors = {n: v for n, v in batch.items() if isinstance(v, Tensor) and n not in _NO_INPUT}
        yield {**tensors, "input_ids": rows}
        return
    mask = (
        _token_rows(batch["attention_mask"])
        if "attention_mask" in batch
        else rows.new_ones(rows.shape)
    )
    for row, kept in zip(rows, mask, strict=True):
        yield {"input_ids": row[kept.bool()][None]}


def _token_rows(value: object) -> Tensor:
    """Whole numbers (samples, tokens), int64, of one row or several."""
    try:
        ids = value if isinstance(value, Tensor) else torch.tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise LRQuantError(
            f"calibration: token ids of type {type(value).__name__} of one length a batch are "
            "needed; give each sample as a row of its own"
        ) from error
    whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if not whole or ids.dim() not in (1, 2) or not ids.numel():
        raise LRQuantError(
            f"calibration: token ids of shape {tuple(ids.shape)} and {ids.dtype}: expected whole "
            "numbers, (tokens,) or (samples, tokens)"
        )
    return ids.reshape(-1, ids.shape[-1]).long().cpu()


def _of_samples(samples: list[Inputs]) -> OwnData:
    """A matrix of token ids where all samples are such of one length."""
    lengths = {sample["input_ids"].shape[1] for sample in samples}
    if 0 in lengths:
        raise LRQuantError("calibration: a sample whose tokens are all masked; take it out")
    if len(lengths) == 1 and all(sample.keys() == {"input_ids"} for sample in samples):
        return OwnData(ids=torch.cat([sample["input_ids"] for sample in samples]))
    return OwnData(feed=Feed(samples))
