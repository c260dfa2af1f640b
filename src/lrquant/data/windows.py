"""Windows of tokens: a text's token ids, cut as the field cuts them."""

from __future__ import annotations

import logging
import random
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lrquant.data.beginnings import Beginning
from lrquant.data.chats import written_out
from lrquant.data.rows import TEXT
from lrquant.data.texts import CONVENTIONS, Text
from lrquant.data.tokens import put_before, tokenise
from lrquant.errors import LRQuantError

logger = logging.getLogger("lrquant")
C4_CROPS = 256
C4_NEW_DOCUMENTS = 1100
_SHOWN = 48  # characters of a document in the log


class TokenText:
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
        window = ids[start : start + seqlen]
        if self.begins(window, seqlen):
            return window
        own = torch.tensor(self.beginning.ids, dtype=torch.int64)
        return torch.cat((own, window[: self.room(seqlen)]))

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


def _crop(tokens: TokenText, ids: Tensor, seqlen: int, rng: random.Random) -> Tensor:
    room = ids.numel() - tokens.room(seqlen)
    start = rng.randint(0, room - 1) if room else 0
    return tokens.window(ids, start, seqlen)


def random_windows(tokens: TokenText, count: int, seqlen: int, seed: int) -> tuple[Tensor, str]:
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
    tokens: TokenText, count: int, seqlen: int, rng: random.Random
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


def consecutive_windows(tokens: TokenText, seqlen: int) -> Tensor:
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
            f"{text.label()}: {ids.numel()} tokens, fewer than one window of seqlen {seqlen}: "
            "give a longer text or a smaller seqlen"
        )
