"""The tokens that each window begins with: those that a model was trained to find there.

A model whose every training sequence began with a beginning-of-sequence token (BOS) computes
something else without it.  Other families' published perplexities are over windows cut out of one
stream, of which the first alone begins with what the tokenizer adds; theirs stay so.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from lrquant.architectures import language_parts
from lrquant.data.tokens import put_before
from lrquant.errors import LRQuantError


@dataclass(frozen=True)
class Beginning:
    """Token ids before the text of each window; `text` says it for people.

    With `stream` the windows are cut out of one stream of tokens, before all of which the tokenizer
    may have put some.
    """

    ids: tuple[int, ...] = ()
    stream: bool = False
    text: str = ""


STREAM = Beginning(stream=True)


def beginning_of(tokenizer: PreTrainedTokenizerBase, model_type: str, rule: str) -> Beginning:
    """How windows of a language part begin by the rule "auto", "always" or "never".

    auto: as the family was published, else as its tokenizer begins.  Raises LRQuantError where
    there is nothing to begin with and the rule or the family asks for it.
    """
    before = put_before(tokenizer)
    if rule == "never":
        return Beginning(text="without BOS")
    families = language_parts()
    family = families[model_type].windows_begin if model_type in families else "tokenizer"
    if rule == "auto" and family == "stream":
        return STREAM
    if not before and (rule == "always" or family == "bos"):
        before = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
    if not before:
        if rule == "always" or family == "bos":
            raise LRQuantError(
                f"--bos {rule}: the tokenizer of this {model_type!r} has no BOS token to begin "
                "windows with; use the model's own tokenizer, or --bos never"
            )
        return Beginning()
    words = "".join(tokenizer.convert_ids_to_tokens(list(before)))
    return Beginning(before, text=f"each window begins with {words}")


def beginning_by_itself(
    tokenizer: PreTrainedTokenizerBase, beginning: Beginning
) -> PreTrainedTokenizerBase:
    """A tokenizer that begins each text so, where this one does not by itself."""
    if not beginning.ids or put_before(tokenizer) == beginning.ids or not tokenizer.is_fast:
        return tokenizer
    words = [str(word) for word in tokenizer.convert_ids_to_tokens(list(beginning.ids))]
    own = copy.deepcopy(tokenizer)
    own.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*words, "$A"],
        pair=[*words, "$A", "$B:1"],
        special_tokens=list(zip(words, beginning.ids, strict=True)),
    )
    return own
