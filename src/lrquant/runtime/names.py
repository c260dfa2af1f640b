"""What modules of a model are called in a native checkpoint of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from transformers import PreTrainedModel

from lrquant.model.experts import expert_form
from lrquant.model.sources.conversion import Conversion

_BLOCKS = re.compile(r"(.+?\.)[0-9]+\.")


def names_in_files(model: PreTrainedModel, experts: Sequence[str]) -> Callable[[str], str]:
    """The names of its own files in blocks of which these have single experts; else the model's.

    `experts` are the names of one expert's linears in the checkpoint, none where none are packed.
    """
    conversion, lists = Conversion(model), set[str]()
    for name, module in model.named_modules():
        match, form = _BLOCKS.match(name), expert_form(module)
        if not experts or match is None or form is None:
            continue
        if conversion.holds(f"{name}.{form.first}", f"{name}.0.{experts[0]}.weight"):
            lists.add(match[1])
    blocks = tuple(lists)
    return lambda name: conversion.published(name) if name.startswith(blocks) else name
