"""The vocabulary of a model: whether token ids are within it, and made by its own tokenizer."""

from __future__ import annotations

from torch import Tensor

from lrquant.data.feeds import Feed
from lrquant.data.prompts import Reader, picture_tokens
from lrquant.errors import LRQuantError

FAR = 0.1  # share of the embedding by which a tokenizer of the same model is not smaller or larger


def require_known_tokens(feed: Feed, name: str, model: Reader) -> None:
    """Refuse ids that the embedding has no row for; those that stand for pictures need none."""
    if model.architecture.reads_pixels:
        return
    rows = embedding_rows(model)
    for index, sample in enumerate(feed.inputs):
        ids = sample.get("input_ids")
        if ids is None:
            continue
        odd = _outside(ids[0], rows) & ~picture_tokens(model, ids[0])
        if bool(odd.any()):
            raise LRQuantError(
                f"{name}: token id {int(ids[0][odd][0])} in sample {index}, but the "
                f"embedding of model {model.name} has ids 0 to {rows - 1}{_tokenizer_of(model)}"
            )


def strange_tokenizer(model: Reader) -> str | None:
    """What to say of a tokenizer that is far smaller or larger than the embedding, or None.

    Embeddings are padded, and a token or two more that no text has do no harm.
    """
    if model.tokenizer is None or model.architecture.reads_pixels:
        return None
    rows, tokens = embedding_rows(model), len(model.tokenizer)
    if abs(tokens - rows) <= FAR * rows:
        return None
    return (
        f"the tokenizer has {tokens} tokens, the embedding {rows} rows: is it the model's own? "
        "Copy its tokenizer files from where the model comes from if not"
    )


def embedding_rows(model: Reader) -> int:
    """How many token ids a model knows."""
    weight = model.skeleton.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight.shape[0]


def _outside(ids: Tensor, rows: int) -> Tensor:
    return (ids < 0) | (ids >= rows)


def _tokenizer_of(model: Reader) -> str:
    if model.tokenizer is None:
        return ""
    return f"; use its own tokenizer (this one has {len(model.tokenizer)} tokens)"
