"""A text as token ids, piece by piece: the ids of the whole in the memory of one piece.

Two pieces that overlap are joined where both have the same tokens at the same offsets, far from
either's end.  What a tokenizer does there depends on nothing beyond: pre-tokenizers read on from
where a word begins, and a sequence of byte-pair tokens is the encoding of its text if each pair of
neighbours is that of its own.  Other models are joined where a word begins.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Encoding
from torch import Tensor
from transformers import PreTrainedTokenizerBase

PIECE = 400_000  # characters that are tokenised at once
OVERLAP = 16_000  # characters that two pieces share
RUN = 16  # tokens on each side of a joint that must be the same


@dataclass(frozen=True)
class _Piece:
    """Tokens of the text from `start` to `end`: ids, and what says where each stands."""

    start: int
    end: int
    ids: NDArray[np.int32]
    encoding: Encoding

    def offsets(self, first: int, last: int) -> NDArray[np.int64]:
        """Where tokens `first` to `last` begin in the whole text, -1 for one without characters."""
        spans = (self.encoding.token_to_chars(index) for index in range(first, last))
        return np.fromiter((-1 if s is None else self.start + s[0] for s in spans), np.int64)

    def offset(self, index: int) -> int:
        """Where a token begins in the whole text."""
        return int(self.offsets(index, index + 1)[0])

    def index_at(self, offset: int) -> int:
        """The first token that begins at an offset of the whole text or after it, by bisection."""
        return bisect_left(range(len(self.ids)), offset, key=self.offset)

    def begins_word(self, index: int) -> bool:
        """Whether a token is the first of a word."""
        words = [self.encoding.token_to_word(each) for each in (index - 1, index)]
        return bool(words[0] != words[1])


def tokenise(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Ids (tokens,) int64 of a text, without special tokens around it; never a warning."""
    if len(text) <= 2 * PIECE or not tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=False, verbose=False)
        return torch.tensor(encoded["input_ids"], dtype=torch.int64)
    return _in_pieces(tokenizer, text)


def put_before(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What the tokenizer puts before a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return tuple(whole[:start])
    return ()


def _in_pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    anywhere = type(tokenizer.backend_tokenizer.model).__name__ == "BPE"
    joined: list[NDArray[np.int32]] = []
    piece, first = _encoded(tokenizer, text, 0, PIECE), 0
    while piece.end < len(text):
        following = _following(tokenizer, text, piece)
        joint = None if following is None else _joint(piece, following, anywhere)
        if following is None or joint is None or joint[0] <= first:
            # Nothing to tell the two apart by, such as one character a million times over.
            piece = _encoded(tokenizer, text, piece.start, piece.end + PIECE)
            continue
        joined.append(piece.ids[first : joint[0]])
        piece, first = following, joint[1]
    joined.append(piece.ids[first:])
    return torch.from_numpy(np.concatenate(joined)).to(torch.int64)


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str, start: int, end: int) -> _Piece:
    end = min(end, len(text))
    encoded = tokenizer(text[start:end], add_special_tokens=False, verbose=False)
    return _Piece(start, end, np.array(encoded["input_ids"], np.int32), encoded[0])


def _following(tokenizer: PreTrainedTokenizerBase, text: str, piece: _Piece) -> _Piece | None:
    """The piece after this one, from a token of it on; None where that would be no step ahead."""
    index = piece.index_at(piece.end - OVERLAP)
    if index >= len(piece.ids) or piece.offset(index) <= piece.start:
        return None
    start = piece.offset(index)
    return _encoded(tokenizer, text, start, start + PIECE)


def _joint(left: _Piece, right: _Piece, anywhere: bool) -> tuple[int, int] | None:
    """Where both go on with the same token: its index in each, None if there is none such."""
    margin = (left.end - right.start) // 4
    lowest, highest = (left.index_at(p) for p in (right.start + margin, left.end - margin))
    for index in range(max(lowest, RUN), min(highest, len(left.ids) - RUN)):
        other = right.index_at(left.offset(index))
        inside = RUN <= other <= len(right.ids) - RUN
        fits = anywhere or (inside and left.begins_word(index) and right.begins_word(other))
        if inside and fits and _same(left, right, index, other):
            return index, other
    return None


def _same(left: _Piece, right: _Piece, index: int, other: int) -> bool:
    """Whether the tokens around two indices are the same, the first of their characters there."""
    ours, theirs = (index - RUN, index + RUN), (other - RUN, other + RUN)
    if not np.array_equal(left.ids[slice(*ours)], right.ids[slice(*theirs)]):
        return False
    offsets = left.offsets(*ours)
    return bool(offsets[RUN - 1] < offsets[RUN]) and np.array_equal(offsets, right.offsets(*theirs))
