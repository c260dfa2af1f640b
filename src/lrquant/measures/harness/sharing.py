"""The harness's requests dealt out over processes; imported only where it is installed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM
from transformers import PretrainedConfig

from lrquant.team.team import Team

Tokens: TypeAlias = tuple[tuple[str, str], list[int], list[int]]  # words, context, continuation
Batch: TypeAlias = list[int]  # which requests are computed together


@dataclass(frozen=True)
class Asked:
    """A request as a model of the harness reads it."""

    args: tuple[object, ...]


@dataclass(frozen=True)
class Work:
    """Requests that one function of the harness's model answers, and each process's share.

    `batch_size` is how many a process computes at once.
    """

    function: str
    batch_size: int
    shares: Sequence[Sequence[object]]


class SharedModel(TemplateLM):
    """What the harness asks on the first of a team: each answers its share by a model of its own.

    Whole batches are dealt out, of the requests that would be computed together in one process, so
    that the numbers are the same.  Texts that are scored as a whole have no such batches.
    """

    def __init__(self, own: HFLM, team: Team) -> None:
        super().__init__()
        self.own, self.team = own, team
        self.tokenizer, self.backend = own.tokenizer, own.backend
        self.max_length: int = own.max_length
        self.config: PretrainedConfig = own.config
        self.get_model_info = own.get_model_info
        self.MULTIMODAL: bool = getattr(own, "MULTIMODAL", False)

    @property
    def eot_token_id(self) -> int:
        return self.own.eot_token_id

    @property
    def prefix_token_id(self) -> int:
        return self.own.prefix_token_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: int | None
    ) -> list[int]:
        return self.own.tok_encode(string, add_special_tokens, **kwargs)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        if self.MULTIMODAL:
            return self.own.loglikelihood(requests, disable_tqdm)  # which of pictures refuses it
        return super().loglikelihood(requests, disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[Tokens], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        groups = computed_once(requests)
        size = self._batch_size([requests[group[0]] for group in groups])
        batches = [
            [index for group in groups[first : first + size] for index in group]
            for first in range(0, len(groups), size)
        ]
        lengths = [len(context) + len(continuation) for _, context, continuation in requests]
        return self._answers("_loglikelihood_tokens", size, requests, batches, lengths)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        asked = [Asked(request.args) for request in requests]
        lengths = [len(request.args[0]) for request in requests]
        texts = [[index] for index in range(len(requests))]
        return self._answers("loglikelihood_rolling", self._batch_size(), asked, texts, lengths)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        asked = [Asked(request.args) for request in requests]
        size = self._batch_size()
        lengths = [len(self.tok_encode(request.args[0])) for request in requests]
        alike: dict[str, Batch] = {}
        for index, request in enumerate(requests):
            alike.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        batches = []
        for indices in alike.values():
            indices.sort(key=lambda index: (-lengths[index], requests[index].args[0]))
            batches += [indices[at : at + size] for at in range(0, len(indices), size)]
        return self._answers("generate_until", size, asked, batches, lengths)

    def _batch_size(self, requests: Sequence[Tokens] | None = None) -> int:
        """How many requests, the longest first, are computed at once: tried here for all."""
        if self.own.batch_size != "auto":
            return self.own.batch_size
        return self.own._detect_batch_size(requests)

    def _answers(
        self,
        function: str,
        size: int,
        requests: Sequence[object],
        batches: Sequence[Batch],
        lengths: Sequence[int],
    ) -> list[Any]:
        """The answers to all requests in their order."""
        shares = dealt(batches, lengths, self.team.size)
        work = Work(function, size, [[requests[index] for index in own] for own in shares])
        told = answer(self.own, self.team, self.team.first(lambda: work))
        pairs = (
            pair
            for own, answers in zip(shares, told, strict=True)
            for pair in zip(own, answers, strict=True)
        )
        return [answered for _, answered in sorted(pairs, key=lambda pair: pair[0])]


def computed_once(requests: Sequence[Tokens]) -> list[Batch]:
    """Requests that differ in their last token, which one pass answers, the longest first.

    So does the harness's own model; of each the first is the one that is computed.
    """
    alike: dict[tuple[int, ...], Batch] = {}
    for index, (_, context, continuation) in enumerate(requests):
        alike.setdefault((*context, *continuation[:-1]), []).append(index)

    def order(group: Batch) -> tuple[int, list[int]]:
        _, context, continuation = requests[group[0]]
        return -len(context) - len(continuation), context + continuation

    for group in alike.values():
        group.sort(key=lambda index: -len(requests[index][2]))
    return sorted(alike.values(), key=order)


def dealt(batches: Sequence[Batch], lengths: Sequence[int], members: int) -> list[Batch]:
    """The requests of each member: batch after batch to the one with the least to compute."""
    shares: list[Batch] = [[] for _ in range(members)]
    loads = [0] * members
    for batch in batches:
        member = loads.index(min(loads))
        shares[member] += batch
        loads[member] += len(batch) * max(lengths[index] for index in batch)
    return shares


def answer(own: HFLM, team: Team, work: Work) -> list[list[object]]:
    """What each member answers to its share, in its order."""
    share, before = work.shares[team.rank], own.batch_size_per_gpu
    own.batch_size_per_gpu = work.batch_size
    answers = getattr(own, work.function)(share) if share else []
    own.batch_size_per_gpu = before
    return team.each(answers)


def serve(own: HFLM, team: Team) -> None:
    """Answer what the first member deals out, until it has no more."""
    while (work := team.first(_no_more)) is not None:
        answer(own, team, work)


def finish(team: Team) -> None:
    """Let the others go on, of whom nothing more is asked."""
    team.first(_no_more)


def _no_more() -> Work | None:
    return None
