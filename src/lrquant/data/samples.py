"""Calibration and evaluation samples: named sets and local files, cut as the field does, seeded."""

from __future__ import annotations

import hashlib
import logging
import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lrquant.data.beginnings import STREAM, Beginning
from lrquant.data.chats import written_out
from lrquant.data.feeds import Feed
from lrquant.data.rows import TEXT
from lrquant.data.texts import CONVENTIONS, Text, is_file_name, load_text
from lrquant.data.tokens import put_before, tokenise
from lrquant.errors import LRQuantError

logger = logging.getLogger("lrquant")
MIX = ("wikitext2", "ptb", "c4")
C4_CROPS = 256
C4_NEW_DOCUMENTS = 1100
_SHOWN = 48  # characters of a document in the log


@dataclass(frozen=True, eq=False)
class Samples:
    """Token ids (samples, tokens) int64; `sha256` is of their shape and little-endian bytes.

    Samples with pictures are in `prompts` and have no common length: their `ids` are empty.
    `whole` is how many the set has, where these are a part of it.
    """

    ids: Tensor
    name: str
    split: str
    origin: str
    sha256: str
    description: str
    prompts: Feed | None = None
    whole: int | None = None

    @property
    def tokens(self) -> int:
        """How many tokens all samples have."""
        if self.prompts is None:
            return self.ids.numel()
        return sum(sample["input_ids"].numel() for sample in self.prompts.inputs)

    @property
    def feed(self) -> Feed:
        """What a model's forward reads."""
        return Feed.of_tokens(self.ids) if self.prompts is None else self.prompts


def calibration_samples(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    nsamples: int,
    seqlen: int,
    seed: int,
    data_dir: Path | None = None,
    cache_dir: Path | None = None,
    beginning: Beginning = STREAM,
    column: str | None = None,
) -> Samples:
    """Draw `nsamples` windows as GPTQ and OmniQuant do, from train, else validation, never test.

    Streams: one draw a window. Document sets: draw documents until one is long enough, then the
    offset. Each set of "mix" or of a comma list starts from `seed` anew.  The `seqlen` tokens of a
    window are its `beginning` and text; `column` is that of the text in a file of rows.
    """
    if nsamples < 1:
        raise LRQuantError(f"nsamples is {nsamples}: at least 1 is needed")
    _check_seqlen(seqlen)
    parts = _calibration_parts(name)
    share, remainder = divmod(nsamples, len(parts))
    texts, windows, labels = [], [], []
    for index, part in enumerate(parts):
        count = share + (index < remainder)
        if count == 0:
            labels.append(f"0 of {part}")
            continue
        text = load_text(part, ("train", "validation"), data_dir, cache_dir, column)
        tokens = _TokenText(text, tokenizer, beginning)
        drawn, note = _random_windows(tokens, count, seqlen, seed)
        missing = _missing_split_note(text, "train", data_dir)
        label = _label(text, missing, tokens.layout, note, beginning.text)
        texts.append(text)
        windows.append(drawn)
        labels.append(label if len(parts) == 1 else f"{count} of {label}")
    ids = torch.cat(windows)
    source = labels[0] if len(parts) == 1 else f"{name}: {', '.join(labels)}"
    return Samples(
        ids,
        name,
        ",".join(dict.fromkeys(text.split for text in texts)),
        ",".join(text.origin for text in texts),
        _sha256(ids),
        f"{source}, {_size(ids)}, seed {seed}",
    )


def perplexity_windows(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    seqlen: int,
    limit: int = -1,
    data_dir: Path | None = None,
    cache_dir: Path | None = None,
    beginning: Beginning = STREAM,
    column: str | None = None,
) -> Samples:
    """Cut the text on which the field measures `name` into windows; the first `limit` if > 0.

    The `seqlen` tokens of a window are its `beginning` and text; `column` is that of the text in a
    file of rows.
    """
    _check_seqlen(seqlen)
    if not is_file_name(name) and ("," in name or name == "mix"):
        raise LRQuantError(f"{name!r}: perplexity is measured on one set at a time")
    convention = CONVENTIONS.get(name)
    splits = (convention.perplexity_split,) if convention else ("test", "validation")
    text = load_text(name, splits, data_dir, cache_dir, column)
    tokens = _TokenText(text, tokenizer, beginning)
    notes = [_missing_split_note(text, splits[0], data_dir), tokens.layout]
    if name == "c4":
        windows, note = _random_windows(tokens, C4_CROPS, seqlen, seed=0)
        notes += [f"{C4_CROPS} random crops, seed 0", note]
    else:
        windows = _consecutive_windows(tokens, seqlen)
    notes.append(beginning.text)
    total = len(windows)
    if 0 < limit < total:
        windows = windows[:limit].clone()
        notes.append(f"the first {limit} of {total} windows")
    return Samples(
        windows,
        name,
        text.split,
        text.origin,
        _sha256(windows),
        f"{_label(text, *notes)}, {_size(windows)}",
        whole=total,
    )


def _calibration_parts(name: str) -> list[str]:
    if is_file_name(name) and Path(name).expanduser().is_file():
        return [name]
    parts: list[str] = []
    for entry in (piece.strip() for piece in name.split(",")):
        parts.extend(MIX if entry == "mix" else [entry])
    if len(set(parts)) < len(parts):
        raise LRQuantError(f"{name!r} names a data set twice: its samples would be repeated")
    return parts


def _check_seqlen(seqlen: int) -> None:
    if seqlen < 2:
        raise LRQuantError(f"seqlen is {seqlen}: at least 2 tokens are needed")


class _TokenText:
    """A text as token ids, and how its windows begin.

    Conversations are written out by the tokenizer's chat template, special tokens included.
    """

    def __init__(
        self, text: Text, tokenizer: PreTrainedTokenizerBase, beginning: Beginning
    ) -> None:
        chats = written_out(text.documents, tokenizer, text.origin)
        self.text = text if chats is None else replace(text, documents=chats.documents)
        way = "" if chats is None else chats.way
        self.layout = "" if text.layout == TEXT else ", ".join(filter(None, (text.layout, way)))
        self.beginning, self._tokenizer = beginning, tokenizer
        plain = chats is None or not chats.special
        before = put_before(tokenizer) if beginning.stream and plain else ()
        self._before = torch.tensor(before, dtype=torch.int64)
        self.joint = "\n\n" if plain else ""
        if text.layout:
            _log_documents(self.text, self.layout or TEXT)

    def ids(self, words: str) -> Tensor:
        """Ids (tokens,) int64; a stream of plain text has what the tokenizer puts before it."""
        ids = tokenise(self._tokenizer, words)
        if len(self._before):
            ids = torch.cat((self._before, ids))
        return ids[len(self.beginning.ids) :] if self.begins(ids) else ids

    def window(self, ids: Tensor, start: int, seqlen: int) -> Tensor:
        """Tokens (seqlen,) from `start` on, behind the beginning unless they have it themselves."""
        part = ids[start : start + seqlen]
        if self.begins(part, seqlen):
            return part
        own = torch.tensor(self.beginning.ids, dtype=torch.int64)
        return torch.cat((own, part[: self.room(seqlen)]))

    def room(self, seqlen: int) -> int:
        """Tokens of text in a window."""
        return seqlen - len(self.beginning.ids)

    def begins(self, ids: Tensor, least: int = 0) -> bool:
        """Whether at least so many tokens have the beginning among them."""
        own = self.beginning.ids
        return bool(own) and len(ids) >= least and tuple(ids[: len(own)].tolist()) == own


def _log_documents(text: Text, layout: str) -> None:
    """Say what of a file of rows is read, and how it begins."""
    first = text.documents[0]
    assert isinstance(first, str)
    start = first[:_SHOWN]
    more = "…" if len(first) > _SHOWN else ""
    logger.info(
        "text %s: %s; %d documents, the first: %s",
        *(text.name, layout, len(text.documents), repr(start)[:-1] + more + repr(start)[-1]),
    )


def _crop(tokens: _TokenText, ids: Tensor, seqlen: int, rng: random.Random) -> Tensor:
    room = ids.numel() - tokens.room(seqlen)
    start = rng.randint(0, room - 1) if room else 0
    return tokens.window(ids, start, seqlen)


def _random_windows(tokens: _TokenText, count: int, seqlen: int, seed: int) -> tuple[Tensor, str]:
    """Windows (count, seqlen) of a stream or of drawn documents, and what to say about them."""
    text = tokens.text
    convention = CONVENTIONS.get(text.name)
    note = ""
    if not (convention and convention.stream) and len(text.documents) > 1:
        drawn = _document_windows(tokens, count, seqlen, random.Random(seed))
        if drawn is not None:
            return drawn, note
        note = f"no document has {seqlen} tokens: all are joined"
    joint = convention.joint if convention and convention.stream else tokens.joint
    ids = tokens.ids(joint.join(_strings(text)))
    _check_length(text, ids, tokens.room(seqlen))
    rng = random.Random(seed)
    return torch.stack([_crop(tokens, ids, seqlen, rng) for _ in range(count)]), note


def _document_windows(
    tokens: _TokenText, count: int, seqlen: int, rng: random.Random
) -> Tensor | None:
    """Windows (count, seqlen), each from a drawn document; None if no document is long enough."""
    documents = tokens.text.documents
    short: set[int] = set()
    windows: list[Tensor] = []
    while len(windows) < count:
        if len(short) == len(documents):
            return None
        index = rng.randint(0, len(documents) - 1)
        if index in short:
            continue
        ids = tokens.ids(str(documents[index]))
        if ids.numel() < tokens.room(seqlen):
            short.add(index)
        else:
            windows.append(_crop(tokens, ids, seqlen, rng))
    return torch.stack(windows)


def _consecutive_windows(tokens: _TokenText, seqlen: int) -> Tensor:
    """All windows (windows, seqlen) of the joined text that do not overlap, its tail dropped."""
    text = tokens.text
    convention = CONVENTIONS.get(text.name)
    joint = convention.joint if convention else tokens.joint
    documents = _strings(text)
    if text.name == "c4-new":
        documents = documents[:C4_NEW_DOCUMENTS]
    ids = tokens.ids(joint.join(documents))
    room = tokens.room(seqlen)
    if text.name == "c4-new":
        ids = ids[: C4_CROPS * room]
    _check_length(text, ids, room)
    windows, start = [], 0
    while start + room <= ids.numel():
        own = tokens.begins(ids[start:])
        if own and ids.numel() < start + seqlen:
            break
        windows.append(tokens.window(ids, start, seqlen))
        start += seqlen if own else room
    return torch.stack(windows)


def _strings(text: Text) -> list[str]:
    return [str(document) for document in text.documents]


def _check_length(text: Text, ids: Tensor, seqlen: int) -> None:
    if ids.numel() < seqlen:
        raise LRQuantError(
            f"{_label(text)}: {ids.numel()} tokens, fewer than one window of seqlen {seqlen}: "
            "give a longer text or a smaller seqlen"
        )


def _missing_split_note(text: Text, preferred: str, data_dir: Path | None) -> str:
    if text.split in (preferred, "file"):
        return ""
    local = data_dir is not None and data_dir in Path(text.origin).parents
    return f"no {preferred} split {f'in {data_dir}' if local else 'on the hub'}"


def _label(text: Text, *notes: str) -> str:
    name = text.name if text.split == "file" else f"{text.name}/{text.split}"
    said = "; ".join(note for note in notes if note)
    return f"{name} ({said})" if said else name


def _size(ids: Tensor) -> str:
    return f"{ids.shape[0]} x {ids.shape[1]} = {ids.numel()} tokens"


def _sha256(ids: Tensor) -> str:
    digest = hashlib.sha256(repr(tuple(ids.shape)).encode())
    digest.update(ids.numpy().astype("<i8").tobytes())
    return digest.hexdigest()
