"""Text that a model writes itself, in full precision, to be calibrated on."""

from __future__ import annotations

import logging
from functools import cached_property

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel

from lrquant.blocks.materialize import materialize
from lrquant.blocks.placement import give_back
from lrquant.blocks.variants import full_precision
from lrquant.blocks.workbench import Workbench
from lrquant.errors import LRQuantError

logger = logging.getLogger("lrquant")
_AT_ONCE = 32  # texts of a batch


class OwnText:
    """Texts by the model of a workbench, each from its beginning on, sampled as it says itself.

    `kept` are texts that were written before, by `name_of`; those that are written are added.
    """

    def __init__(self, workbench: Workbench, kept: dict[str, Tensor] | None = None) -> None:
        self.workbench = workbench
        self.kept: dict[str, Tensor] = dict(kept or {})

    def __call__(self, count: int, seqlen: int, seed: int, start: tuple[int, ...]) -> Tensor:
        """Token ids (count, seqlen), int64, that begin with `start`, or else with any token."""
        name = name_of(count, seqlen, seed)
        if name not in self.kept:
            logger.info("calibration text: the model writes %d x %d tokens", count, seqlen)
            self.kept[name] = self._written(count, seqlen, seed, start)
        return self.kept[name]

    def release(self) -> None:
        """Let go of the whole model, once all is written."""
        self.__dict__.pop("_module", None)
        give_back(self.workbench.device)

    @cached_property
    def _module(self) -> PreTrainedModel:
        bench = self.workbench
        module = materialize(bench.full_precision, full_precision(bench))
        if not isinstance(module, GenerationMixin):
            raise LRQuantError(
                f"calibration set 'self': a {type(module).__name__} writes no text; name another"
            )
        return module

    @torch.no_grad()
    def _written(self, count: int, seqlen: int, seed: int, start: tuple[int, ...]) -> Tensor:
        module, device = self._module, self.workbench.device
        devices = [device] if device.type == "cuda" else []
        texts = []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            for first in range(0, count, _AT_ONCE):
                number = min(_AT_ONCE, count - first)
                ids = torch.tensor(start).expand(number, -1)
                if not start:
                    ids = torch.randint(module.config.get_text_config().vocab_size, (number, 1))
                texts.append(_continued(module, ids.to(device), seqlen).cpu())
        return torch.cat(texts)


def name_of(count: int, seqlen: int, seed: int) -> str:
    """What texts are kept under."""
    return f"{count}x{seqlen}-seed{seed}"


def _continued(module: PreTrainedModel, ids: Tensor, seqlen: int) -> Tensor:
    """Ids (texts, seqlen) of which the first are given; none ends before."""
    new = seqlen - ids.shape[1]
    if new < 1:
        return ids[:, :seqlen]
    generate = getattr(module, "generate")  # noqa: B009
    return generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        min_new_tokens=new,
        max_new_tokens=new,
        pad_token_id=0,
    )
