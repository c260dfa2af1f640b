"""Calibration and evaluation samples: named sets and local files, cut as the field does, seeded."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lrquant.errors import LRQuantError
from lrquant.feeds import Feed
from lrquant.texts import CONVENTIONS, Text, is_file_name, load_text

MIX = ("wikitext2", "ptb", "c4")
C4_CROPS = 256
C4_NEW_DOCUMENTS = 1100


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
) -> Samples:
    """Draw `nsamples` windows as GPTQ and OmniQuant do, from train, else validation, never test.

    Streams: one draw a window. Document sets: draw documents until one is long enough, then the
    offset. Each set of "mix" or of a comma list starts from `seed` anew.
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
        text = load_text(part, ("train", "validation"), data_dir, cache_dir)
        drawn, note = _random_windows(text, tokenizer, count, seqlen, seed)
        label = _label(text, _missing_split_note(text, "train", data_dir), note)
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
) -> Samples:
    """Cut the text on which the field measures `name` into windows; the first `limit` if > 0."""
    _check_seqlen(seqlen)
    if not is_file_name(name) and ("," in name or name == "mix"):
        raise LRQuantError(f"{name!r}: perplexity is measured on one set at a time")
    convention = CONVENTIONS.get(name)
    splits = (convention.perplexity_split,) if convention else ("test", "validation")
    text = load_text(name, splits, data_dir, cache_dir)
    notes = [_missing_split_note(text, splits[0], data_dir)]
    if name == "c4":
        windows, note = _random_windows(text, tokenizer, C4_CROPS, seqlen, seed=0)
        notes += [f"{C4_CROPS} random crops, seed 0", note]
    else:
        windows = _consecutive_windows(text, tokenizer, seqlen)
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


def _tokenise(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Ids (tokens,) int64 with the tokenizer's default special tokens; no warning on length."""
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def _crop(ids: Tensor, seqlen: int, rng: random.Random) -> Tensor:
    room = ids.numel() - seqlen
    start = rng.randint(0, room - 1) if room else 0
    return ids[start : start + seqlen]


def _random_windows(
    text: Text, tokenizer: PreTrainedTokenizerBase, count: int, seqlen: int, seed: int
) -> tuple[Tensor, str]:
    """Windows (count, seqlen) of a stream or of drawn documents, and what to say about them."""
    convention = CONVENTIONS.get(text.name)
    note = ""
    if not (convention and convention.stream) and len(text.documents) > 1:
        drawn = _document_windows(text.documents, tokenizer, count, seqlen, random.Random(seed))
        if drawn is not None:
            return drawn, note
        note = f"no document has {seqlen} tokens: all are joined"
    joint = convention.joint if convention and convention.stream else "\n\n"
    ids = _tokenise(tokenizer, joint.join(text.documents))
    _check_length(text, ids, seqlen)
    rng = random.Random(seed)
    return torch.stack([_crop(ids, seqlen, rng) for _ in range(count)]), note


def _document_windows(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    seqlen: int,
    rng: random.Random,
) -> Tensor | None:
    """Windows (count, seqlen), each from a drawn document; None if no document is long enough."""
    short: set[int] = set()
    windows: list[Tensor] = []
    while len(windows) < count:
        if len(short) == len(documents):
            return None
        index = rng.randint(0, len(documents) - 1)
        if index in short:
            continue
        ids = _tokenise(tokenizer, documents[index])
        if ids.numel() < seqlen:
            short.add(index)
        else:
            windows.append(_crop(ids, seqlen, rng))
    return torch.stack(windows)


def _consecutive_windows(text: Text, tokenizer: PreTrainedTokenizerBase, seqlen: int) -> Tensor:
    """All non-overlapping windows (windows, seqlen) of the joined text, its tail dropped."""
    convention = CONVENTIONS.get(text.name)
    joint = convention.joint if convention else "\n\n"
    documents = text.documents
    if text.name == "c4-new":
        documents = documents[:C4_NEW_DOCUMENTS]
    ids = _tokenise(tokenizer, joint.join(documents))
    if text.name == "c4-new":
        ids = ids[: C4_CROPS * seqlen]
    _check_length(text, ids, seqlen)
    count = ids.numel() // seqlen
    return ids[: count * seqlen].view(count, seqlen).clone()


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
