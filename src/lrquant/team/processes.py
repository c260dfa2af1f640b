"""A team of processes over torch.distributed: how they join, speak, and end together."""

from __future__ import annotations

import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import FrameType
from typing import TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from lrquant.errors import LRQuantError
from lrquant.team.launch import Launch
from lrquant.team.team import ALONE, Team, sum_in_order

T = TypeVar("T")
Handler: TypeAlias = Callable[[int, FrameType | None], object] | int | signal.Handlers
logger = logging.getLogger("lrquant")
MEETING = timedelta(minutes=10)  # until all have been started
STEP = timedelta(minutes=30)  # the longest that one CUDA device waits for the others in a step
ALONE_AT_WORK = timedelta(days=7)  # the longest that all wait for what the first does alone
_PAUSE, _GRACE = 1.0, 10.0  # seconds between looks at the others; to come to the end by itself
_PRECEDENCE = 0.5  # seconds for which others let the first tell what ended them alike
_ENDED, _TOLD = "lrquant/ended", "lrquant/told"


class Ended(LRQuantError):
    """Another process of the team is gone."""

    def __init__(self) -> None:
        super().__init__(
            "another process of this command was ended; give it again: quantize goes on after its "
            "finished blocks with --resume, also with another number of processes"
        )


class Processes(Team):
    """Each member is a process; gloo carries what is rare, NCCL what is summed on CUDA devices."""

    def __init__(self, launch: Launch, store: dist.Store) -> None:
        self.rank, self.size, self.store = launch.rank, launch.size, store
        own = dist.PrefixStore("lrquant", store)
        dist.init_process_group(
            "gloo",
            store=own,
            timeout=ALONE_AT_WORK,
            rank=self.rank,
            world_size=self.size,
        )
        self._devices: dist.ProcessGroup | None = None
        if all(self.each(torch.cuda.is_available())):
            if launch.local_rank < torch.cuda.device_count():
                torch.cuda.set_device(launch.local_rank)
            self._devices = dist.new_group(backend="nccl", timeout=STEP)

    def each(self, value: T) -> list[T]:
        values: list[T] = [value] * self.size
        with _others():
            dist.all_gather_object(values, value)
        values[self.rank] = value
        return values

    def first(self, make: Callable[[], T]) -> T:
        made = [make() if self.rank == 0 else None]
        own = made[0]
        with _others():
            dist.broadcast_object_list(made, src=0)
        return own if self.rank == 0 else made[0]  # type: ignore[return-value]

    def ordered_sum(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Each member sums its part of the values, of all rows, and tells the others."""
        group = self._devices if rows.device.type == "cuda" else None
        values = rows.shape[1]
        width = -(-values // self.size)
        sent = torch.nn.functional.pad(rows, (0, width * self.size - values))
        sent = sent.unflatten(1, (self.size, width)).transpose(0, 1).contiguous()
        received = rows.new_empty((sum(counts), width))
        parts = rows.new_empty((self.size, width))
        with _others():
            dist.all_to_all_single(
                received.view(-1),
                sent.view(-1),
                [count * width for count in counts],
                [len(rows) * width] * self.size,
                group=group,
            )
            dist.all_gather(list(parts), sum_in_order(received), group=group)
        return parts.view(-1)[:values]

    def tells(self, error: BaseException) -> bool:
        """Whether it is this process that says why all end; the others then know that they do."""
        try:
            if isinstance(error, Ended):
                if self._told_of_an_end():
                    return False
            else:
                self.store.set(_ENDED, "")
                time.sleep(_PRECEDENCE if self.rank else 0)
            return self.store.add(_TOLD, 1) == 1
        except RuntimeError:  # the store is gone with the process that had it
            return True

    def _told_of_an_end(self) -> bool:
        """Whether the process that is gone has said so; it may be about to."""
        for _ in range(10):
            if self.store.check([_ENDED]):
                return True
            time.sleep(_PRECEDENCE / 5)
        return False


@contextmanager
def joined() -> Iterator[Team]:
    """The processes of this launch as a team, or a process that is alone.

    When one raises, or is ended, all end, and one of them says why.  The first alone logs.
    """
    launch = Launch.of_environment()
    if launch.size == 1:
        yield ALONE
        return
    team = Processes(launch, _meet())
    quiet, logger.disabled = logger.disabled, logger.disabled or team.rank > 0
    with _watching(team):
        try:
            yield team
        except BaseException as error:
            _on_sigterm(signal.SIG_IGN)  # this process ends, and may say why
            if not team.tells(error):
                raise SystemExit(2) from None
            if isinstance(error, LRQuantError) and not isinstance(error, Ended) and team.rank:
                raise LRQuantError(f"rank {team.rank} of {team.size}: {error}") from error
            raise
    logger.disabled = quiet
    dist.destroy_process_group()


def _meet() -> dist.Store:
    """Where the processes of a launch find each other; a new place each time that they do."""
    try:
        store, rank, _ = next(rendezvous("env://", timeout=MEETING))
        return dist.PrefixStore(str(store.add(f"lrquant/{rank}", 1)), store)
    except (RuntimeError, ValueError) as error:
        raise LRQuantError(
            f"the processes do not find each other ({str(error).splitlines()[0]}); start them with "
            "torchrun, or unset RANK and WORLD_SIZE"
        ) from error


@contextmanager
def _others() -> Iterator[None]:
    """What torch says where another process has gone, as such."""
    try:
        yield
    except RuntimeError as error:
        raise Ended() from error


@contextmanager
def _watching(team: Processes) -> Iterator[None]:
    """End with the others, also where this process waits for its device and sees nothing of it.

    A launcher ends what is left with SIGTERM, which here raises `Ended`.  Where something is
    raised the watch goes on until the process has ended.
    """
    over, (heard, signalled) = threading.Event(), os.pipe()
    os.set_blocking(signalled, False)
    watch = threading.Thread(target=_watch, args=(team, heard, over), daemon=True)
    before = _on_sigterm(_end)
    wakeup = -1 if before is None else signal.set_wakeup_fd(signalled, warn_on_full_buffer=False)
    watch.start()
    yield
    over.set()
    if before is not None:
        signal.set_wakeup_fd(wakeup)
        _on_sigterm(before)
    os.write(signalled, b"\0")  # so that the watch looks
    watch.join()
    os.close(heard)
    os.close(signalled)


def _on_sigterm(handler: Handler) -> Handler | None:
    """Set what SIGTERM does; what it did before, None where only another thread may say."""
    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGTERM, handler) or signal.SIG_DFL


def _end(number: int, frame: object) -> None:
    raise Ended()


def _watch(team: Processes, heard: int, over: threading.Event) -> None:
    """Wait until the others end, then give this process a while to do so too, and end it."""
    ended = False
    while not ended and not over.is_set():
        ready, _, _ = select.select([heard], [], [], _PAUSE)
        ended = bool(ready) and signal.SIGTERM in os.read(heard, 64)
        with suppress(RuntimeError):
            ended = ended or team.store.check([_ENDED])
    if ended and not over.wait(_GRACE):
        if team.tells(Ended()):
            os.write(2, f"lrquant: {Ended()}\n".encode())
        os._exit(2)
