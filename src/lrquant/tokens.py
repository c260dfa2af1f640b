"""A text as token ids, piece by piece: the ids of the whole in the memory of one piece.

Two pieces that overlap are joined where both have the same tokens at the same places, far from
either's end.  What a tokenizer does there depends on nothing beyond: pre-tokenizers read on from
where a word begins, and a sequence of byte-pair tokens is the encoding of its text if each pair of
neighbours is that of its own.  Other models are joined where a word begins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

PIECE = 400_000  # characters that are tokenised at once
OVERLAP = 16_000  # characters that two pieces share
RUN = 16  # tokens on each side of a joint that must be the same


@dataclass(frozen=True)
class _Piece:
    """Tokens of the text from `start` to `end`: ids, places in the whole text, and words."""

    start: int
    end: int
    ids: NDArray[Any]
    starts: NDArray[Any]
    words: NDArray[Any]


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
    parts: list[NDArray[Any]] = []
    piece, first = _encoded(tokenizer, text, 0, PIECE), 0
    while piece.end < len(text):
        following = _following(tokenizer, text, piece)
        joint = None if following is None else _joint(piece, following, anywhere)
        if following is None or joint is None or joint[0] <= first:
            # Nothing to tell the two apart by, such as one character a million times over.
            piece = _encoded(tokenizer, text, piece.start, piece.end + PIECE)
            continue
        parts.append(piece.ids[first : joint[0]])
        piece, first = following, joint[1]
    parts.append(piece.ids[first:])
    return torch.from_numpy(np.concatenate(parts)).to(torch.int64)


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str, start: int, end: int) -> _Piece:
    end = min(end, len(text))
    encoded = tokenizer(
        text[start:end], add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    starts = np.fromiter((place for place, _ in encoded["offset_mapping"]), np.int64)
    words = np.fromiter((-1 if word is None else word for word in encoded.word_ids(0)), np.int64)
    return _Piece(start, end, np.array(encoded["input_ids"], np.int32), starts + start, words)


def _following(tokenizer: PreTrainedTokenizerBase, text: str, piece: _Piece) -> _Piece | None:
    """The piece after this one, from a token of it on; None where that would be no step ahead."""
    index = int(np.searchsorted(piece.starts, piece.end - OVERLAP))
    if index >= len(piece.starts) or piece.starts[index] <= piece.start:
        return None
    start = int(piece.starts[index])
    return _encoded(tokenizer, text, start, start + PIECE)


def _joint(left: _Piece, right: _Piece, anywhere: bool) -> tuple[int, int] | None:
    """Where both go on with the same token: its index in each, None if there is no such place."""
    margin = (left.end - right.start) // 4
    lowest, highest = np.searchsorted(left.starts, [right.start + margin, left.end - margin])
    for index in range(max(int(lowest), RUN), min(int(highest), len(left.ids) - RUN)):
        other = int(np.searchsorted(right.starts, left.starts[index]))
        if RUN <= other <= len(right.ids) - RUN and _same(left, right, index, other):
            begins = left.words[index] != left.words[index - 1]
            if anywhere or (begins and right.words[other] != right.words[other - 1]):
                return index, other
    return None


def _same(left: _Piece, right: _Piece, index: int, other: int) -> bool:
    """Whether the tokens around two indices are the same, the first of their characters there."""
    ours, theirs = slice(index - RUN, index + RUN), slice(other - RUN, other + RUN)
    return bool(
        left.starts[index - 1] < left.starts[index]
        and np.array_equal(left.starts[ours], right.starts[theirs])
        and np.array_equal(left.ids[ours], right.ids[theirs])
    )
