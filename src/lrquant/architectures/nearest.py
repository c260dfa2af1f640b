"""The declared family that is most like a model that none serves, and in what the two differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import takewhile

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from lrquant.architectures.architecture import Architecture, architectures
from lrquant.architectures.depth import require_depth

_AUTO_CLASSES = (
    (MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM),
    (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText),
)
_FAILURES = (  # of code that is given another family's configuration, or one that is not whole
    *(ArithmeticError, AssertionError, AttributeError, ImportError),
    *(LookupError, RuntimeError, TypeError, ValueError),
)
_SHOWN = 3
_PLAINEST = "llama"
_NAMESAKE = 4  # letters at the beginning of two names that say that the two are of one line


@dataclass(frozen=True)
class _Likeness:
    """One block held against a family: names of parts that both have, and that one of them has.

    `norms` are vectors of the block of which the declaration says nothing.
    """

    family: str
    shared: int
    lacking: list[str]
    beyond: list[str]
    norms: list[str]
    sites: int

    @property
    def words(self) -> str:
        """What differs, for people."""
        has, without = _listed(self.beyond), _listed(self.lacking)
        said = [f"have {has}"] * bool(has) + [f"have no {without}"] * bool(without)
        if said:
            return f"but this one's blocks {' and '.join(said)}"
        if self.norms:
            return f"but its declaration says nothing of {_listed(self.norms)} in this one's blocks"
        return "and their blocks have the same parts; whether they compute the same is to be proved"


def nearest(config: PretrainedConfig) -> str:
    """What a model that no family serves is most like, and how the block least like it differs.

    The model is laid out without weights; what transformers cannot lay out is said to be so.
    """
    require_depth(config)
    try:
        model = _laid_out(config)
        blocks = None if model is None else _block_list(model, config.get_text_config())
    except _FAILURES as error:
        return f"transformers lays out none from this configuration ({_first_line(error)})"
    if blocks is None:
        return "nor is it a decoder of blocks in transformers"
    text = config.get_text_config()
    likenesses = [each for i in _kinds(blocks) for each in _likenesses(blocks[i], text, i)]
    rank = partial(_rank, str(config.model_type))
    best = max(likenesses, key=rank)
    if not best.shared:
        return "its blocks have no part in common with those of a declared one"
    worst = min((each for each in likenesses if each.family == best.family), key=rank)
    return f"the nearest that is declared is {best.family!r}, {worst.words}"


def _rank(model_type: str, likeness: _Likeness) -> tuple[int, int, int, int, bool]:
    """Larger is more alike: in parts and in name, in what else there is; at last the plainest."""
    pairs = zip(model_type, likeness.family, strict=False)
    prefix = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    named = prefix if prefix >= _NAMESAKE else 0
    others = len(likeness.lacking) + len(likeness.beyond)
    sites = -likeness.sites if likeness.norms else likeness.sites  # norms often rule sites out
    plainest = likeness.family == _PLAINEST
    return likeness.shared + 2 * (named > 0), named, -others, sites, plainest


def _laid_out(config: PretrainedConfig) -> PreTrainedModel | None:
    for mapping, auto_class in _AUTO_CLASSES:
        if type(config) in mapping:
            with torch.device("meta"):
                model: PreTrainedModel = auto_class.from_config(config, trust_remote_code=False)
            return model
    return None


def _block_list(model: nn.Module, text: PretrainedConfig) -> nn.ModuleList | None:
    """The list of as many modules as the configuration has blocks, of several the largest."""
    depth = getattr(text, "num_hidden_layers", None)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    deep = [each for each in lists if len(each) == depth] or lists
    return max(deep, key=lambda each: sum(p.numel() for p in each.parameters()), default=None)


def _kinds(blocks: nn.ModuleList) -> Iterator[int]:
    """The first block of each kind, told apart by the names of what is in it."""
    seen = set()
    for index, block in enumerate(blocks):
        names = frozenset(name for name, _ in block.named_parameters())
        if names not in seen:
            seen.add(names)
            yield index


def _likenesses(block: nn.Module, text: PretrainedConfig, index: int) -> Iterator[_Likeness]:
    for family in {each.name: each for each in architectures().values()}.values():
        if family.tower is None and not family.reads_pixels:
            yield _likeness(family, block, text, index)


def _likeness(
    family: Architecture, block: nn.Module, text: PretrainedConfig, index: int
) -> _Likeness:
    own = {name: p.dim() for name, p in block.named_parameters() if not name.endswith("bias")}
    wide = {name for name, axes in own.items() if axes > 1}
    try:
        parts, sites = _declared(family, text, index)
    except _FAILURES:
        parts, sites = set(), 0
    return _Likeness(
        family.name,
        len(parts & own.keys()),
        sorted(parts - own.keys()),
        sorted(wide - parts),
        sorted(own.keys() - wide - parts),
        sites,
    )


def _declared(family: Architecture, text: PretrainedConfig, index: int) -> tuple[set[str], int]:
    """Names of the parameters of which a declaration speaks, and how many sites it has."""
    sites = family.sites(text, index)
    norms = {f"{s.producer.module}.weight" for s in sites if s.producer.axis == "norm"}
    matrices = {matrix.parameter for matrix in family.matrices(text, index)}
    return matrices | norms | {*family.kept(text, index)}, len(sites)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(name.removesuffix(".weight") for name in names[:_SHOWN]) + more


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:100]
