"""Calibration and evaluation samples: named sets and local files, cut as the field does, seeded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lrquant.data.beginnings import STREAM, Beginning
from lrquant.data.feeds import Feed
from lrquant.data.texts import CONVENTIONS, TextSplit, is_file_name, load_text, require_known
from lrquant.data.windows import C4_CROPS, TokenText, consecutive_windows, random_windows
from lrquant.errors import LRQuantError

MIX = ("wikitext2", "ptb", "c4")
SELF = "self"  # the set that the model writes
Writer = Callable[[int, int, int, tuple[int, ...]], Tensor]  # of count, seqlen, seed and beginning


@dataclass(frozen=True, eq=False)
class Samples:
    """Token ids (samples, tokens) int64; `sha256` is of their shape and little-endian bytes.

    Samples with pictures are in `prompts` and have no common length: their `ids` are empty.
    `whole` is how many the set has, where these are some of it; `texts` are the splits that they
    are of.
    """

    ids: Tensor
    name: str
    split: str
    sha256: str
    description: str
    prompts: Feed | None = None
    whole: int | None = None
    texts: frozenset[TextSplit] = frozenset()

    def only(self, indices: range) -> Samples:
        """Some of them."""
        if self.prompts is not None:
            return replace(self, prompts=self.prompts.only(indices))
        return replace(self, ids=self.ids[indices.start : indices.stop])

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
    writer: Writer | None = None,
) -> Samples:
    """Draw `nsamples` windows as GPTQ and OmniQuant do, from train, else validation, never test.

    Streams: one draw a window. Document sets: draw documents until one is long enough, then the
    offset. Each set of "mix" or of a comma list starts from `seed` anew.  The `seqlen` tokens of a
    window are its `beginning` and text; `column` is that of the text in a file of rows.  The set
    "self" comes of the `writer`.
    """
    if nsamples < 1:
        raise LRQuantError(f"nsamples is {nsamples}: at least 1 is needed")
    _check_seqlen(seqlen)
    sets = _calibration_sets(name)
    share, remainder = divmod(nsamples, len(sets))
    windows, labels, splits = [], [], []
    texts: set[TextSplit] = set()
    for index, each in enumerate(sets):
        count = share + (index < remainder)
        if count == 0:
            labels.append(f"0 of {each}")
            continue
        if each == SELF:
            if writer is None:
                raise LRQuantError(f"calibration set {SELF!r}: no model to write it")
            drawn = writer(count, seqlen, seed, _start(tokenizer, beginning))
            label, split = SELF, "written"
        else:
            text = load_text(each, ("train", "validation"), data_dir, cache_dir, column)
            tokens = TokenText(text, tokenizer, beginning)
            drawn, note = random_windows(tokens, count, seqlen, seed)
            missing = text.missing_split("train", data_dir)
            label = text.label(missing, tokens.layout, note, beginning.text)
            split = text.split
            texts.add(text.source)
        splits.append(split)
        windows.append(drawn)
        labels.append(label if len(sets) == 1 else f"{count} of {label}")
    source = labels[0] if len(sets) == 1 else f"{name}: {', '.join(labels)}"
    split = ",".join(dict.fromkeys(splits))
    return token_samples(torch.cat(windows), name, split, source, seed, frozenset(texts))


def token_samples(
    ids: Tensor,
    name: str,
    split: str,
    source: str,
    seed: int,
    texts: frozenset[TextSplit] = frozenset(),
) -> Samples:
    """Windows of token ids that were drawn from a `source`, in words, and `texts`, by a seed."""
    text = f"{source}, {_size(ids)}, seed {seed}"
    return Samples(ids, name, split, _sha256(ids), text, texts=texts)


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
    tokens = TokenText(text, tokenizer, beginning)
    notes = [text.missing_split(splits[0], data_dir), tokens.layout]
    if name == "c4":
        windows, note = random_windows(tokens, C4_CROPS, seqlen, seed=0)
        notes += [f"{C4_CROPS} random crops, seed 0", note]
    else:
        windows = consecutive_windows(tokens, seqlen)
    notes.append(beginning.text)
    total = len(windows)
    if 0 < limit < total:
        windows = windows[:limit].clone()
        notes.append(f"the first {limit} of {total} windows")
    return Samples(
        windows,
        name,
        text.split,
        _sha256(windows),
        f"{text.label(*notes)}, {_size(windows)}",
        whole=total,
        texts=frozenset({text.source}),
    )


def require_known_sets(name: str, data_dir: Path | None) -> None:
    """Refuse a data set to calibrate on, or one of several, that is not to be had."""
    for each in _calibration_sets(name):
        if each != SELF:
            require_known(each, data_dir)


def written_by_the_model(name: str) -> bool:
    """Whether samples of this set, or of one of several, are written by the model."""
    return SELF in _calibration_sets(name)


def _start(tokenizer: PreTrainedTokenizerBase, beginning: Beginning) -> tuple[int, ...]:
    """The tokens that a model's own text begins with: BOS, where there is one."""
    bos = tokenizer.bos_token_id
    return beginning.ids or (() if bos is None else (bos,))


def _calibration_sets(name: str) -> list[str]:
    if is_file_name(name) and Path(name).expanduser().is_file():
        return [name]
    sets: list[str] = []
    for entry in (piece.strip() for piece in name.split(",")):
        sets.extend(MIX if entry == "mix" else [entry])
    if len(set(sets)) < len(sets):
        raise LRQuantError(f"{name!r} names a data set twice: its samples would be repeated")
    return sets


def _check_seqlen(seqlen: int) -> None:
    if seqlen < 2:
        raise LRQuantError(f"seqlen is {seqlen}: at least 2 tokens are needed")


def _size(ids: Tensor) -> str:
    return f"{ids.shape[0]} x {ids.shape[1]} = {ids.numel()} tokens"


def _sha256(ids: Tensor) -> str:
    digest = hashlib.sha256(repr(tuple(ids.shape)).encode())
    digest.update(ids.numpy().astype("<i8").tobytes())
    return digest.hexdigest()
