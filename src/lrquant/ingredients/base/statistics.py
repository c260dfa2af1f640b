"""Per-channel statistics of linear inputs: the largest magnitude and the running midpoint."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lrquant.config.groups import StatisticsFiles
from lrquant.errors import UNREADABLE, LRQuantError
from lrquant.files.whole import read_plain, write_whole

Figures = tuple[Tensor, Tensor, Tensor, Tensor]  # of a sample: largest, midpoint, means of x, x²
Observed = dict[str, list[Figures]]
InOrder = Callable[[Sequence[Observed]], Sequence[Observed]]  # of every member's batches
SHIFT_DECAY = 0.99  # of the running midpoint, per sample (published code)


@dataclass
class ChannelStatistics:
    """Statistics by linear name, each (in,), float32, where the inputs were seen.

    maxima: largest |x_j| over all tokens.  midpoints: ``0.99 m + 0.01 (max_j + min_j) / 2`` over
    the samples in order, the first sample's midpoint as the start.  means and squares:
    of x_j and x_j**2, of each sample, summed over the samples; they stay in memory, the published
    files do not have them.
    """

    maxima: dict[str, Tensor] = field(default_factory=dict)
    midpoints: dict[str, Tensor] = field(default_factory=dict)
    means: dict[str, Tensor] = field(default_factory=dict)
    squares: dict[str, Tensor] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)

    def observe(self, name: str, values: Tensor, weights: Tensor | None = None) -> None:
        """Take in the input (samples, tokens, in) or (tokens, in) of one linear.

        Means count tokens as their `weights` (samples, tokens) say; one of weight 0 is not seen.
        """
        for figures in figures_of(values, weights):
            self.take_in(name, figures)

    def take_in(self, name: str, figures: Figures) -> None:
        """Take in one sample's figures, which come in the order of samples."""
        maximum, midpoint, mean, square = figures
        if name in self.maxima:
            maximum = torch.maximum(self.maxima[name], maximum)
            midpoint = SHIFT_DECAY * self.midpoints[name] + (1 - SHIFT_DECAY) * midpoint
        self.maxima[name], self.midpoints[name] = maximum, midpoint
        for sums, own in ((self.means, mean), (self.squares, square)):
            sums[name] = sums.get(name, torch.zeros_like(own)) + own
        self.samples[name] = self.samples.get(name, 0) + 1

    def whole(self, in_order: InOrder) -> ChannelStatistics:
        """The same on the CPU: one process has seen all samples."""
        return self.on_host()

    def on_host(self) -> ChannelStatistics:
        """The same on the CPU."""
        maxima, midpoints, means, squares = (
            {name: value.cpu() for name, value in table.items()}
            for table in (self.maxima, self.midpoints, self.means, self.squares)
        )
        return ChannelStatistics(maxima, midpoints, means, squares, self.samples)

    def importance(self, name: str, like: Tensor, shift: Tensor | None) -> Tensor:
        """Mean squared inputs of a linear (in,), `shift` taken off them, on the device of `like`.

        Ones for a linear that was not seen; their mean is 1 in any case.
        """
        if name not in self.squares:
            return torch.ones(like.shape[1], device=like.device)
        count = self.samples[name]
        mean, square = (sums[name].to(like.device) / count for sums in (self.means, self.squares))
        if shift is not None:
            square = (square - 2 * shift * mean + shift.square()).clamp(min=0)
        return square / square.mean().clamp(min=torch.finfo(torch.float32).tiny)

    def save(self, scales: Path, shifts: Path) -> None:
        """Write the two files that the published tool reads: name -> tensor."""
        for path, values in ((scales, self.maxima), (shifts, self.midpoints)):
            content = io.BytesIO()
            torch.save(values, content)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_whole(path, content.getvalue())
            except OSError as error:
                reason = str(error).splitlines()[0]
                raise LRQuantError(
                    f"statistics {path}: cannot be written ({reason}); free some space or use "
                    "another folder"
                ) from error


@dataclass
class ShareOfStatistics:
    """What one member of a team has seen of each linear, batch by batch, until all is told.

    A running midpoint depends on the order of samples, as rounded sums do.
    """

    batches: dict[str, list[list[Figures]]] = field(default_factory=dict)

    def observe(self, name: str, values: Tensor, weights: Tensor | None = None) -> None:
        """As `ChannelStatistics.observe`, of a batch in which each linear is seen once."""
        self.batches.setdefault(name, []).append(figures_of(values, weights))

    def whole(self, in_order: InOrder) -> ChannelStatistics:
        """Those of all samples; `in_order` makes of a member's batches all members'."""
        columns = zip(*self.batches.values(), strict=True)
        own = [dict(zip(self.batches, map(_on_host, each), strict=True)) for each in columns]
        statistics = ChannelStatistics()
        for batch in in_order(own):
            for name, samples in batch.items():
                for figures in samples:
                    statistics.take_in(name, figures)
        return statistics


def figures_of(values: Tensor, weights: Tensor | None = None) -> list[Figures]:
    """Figures (in,) float32 of each sample of a linear's input: see `ChannelStatistics.observe`."""
    values = values.detach()
    samples = values if values.dim() == 3 else values[None]
    shares = [None] * len(samples) if weights is None else weights
    figures = []
    for sample, share in zip(samples.float(), shares, strict=True):
        if share is not None:
            sample, share = sample[share > 0], share[share > 0]
        low, high = sample.amin(0), sample.amax(0)
        means = [
            each.mean(0) if share is None else share @ each / share.sum()
            for each in (sample, sample.square())
        ]
        figures.append((torch.maximum(high, -low), (low + high) / 2, means[0], means[1]))
    return figures


def _on_host(samples: list[Figures]) -> list[Figures]:
    return [(a.cpu(), b.cpu(), c.cpu(), d.cpu()) for a, b, c, d in samples]


def require_replaceable(paths: Sequence[Path], overwrite: bool) -> None:
    """Refuse, before anything is gathered, to replace files without `overwrite`, or other files."""
    for path in paths:
        if not os.path.lexists(path):
            continue
        if not overwrite:
            raise LRQuantError(
                f"statistics {path}: already there; replace it with --overwrite, or use another "
                "folder"
            )
        _load(path)


def load_statistics(scales: Path, shifts: Path | None) -> ChannelStatistics:
    """Read files of this or the published tool; never unpickles anything but tensors."""
    midpoints = {} if shifts is None else _load(shifts)
    return ChannelStatistics(_load(scales), midpoints)


def _load(path: Path) -> dict[str, Tensor]:
    try:
        content = io.BytesIO(read_plain(path))
    except FileNotFoundError as error:
        raise LRQuantError(
            f"statistics {path}: no such file; make it with `lrquant stats`, or leave the option "
            "out and statistics are gathered on the way"
        ) from error
    except OSError as error:
        raise LRQuantError(f"statistics {path}: cannot be read ({error.strerror})") from error
    try:
        values = torch.load(content, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise LRQuantError(
            f"statistics {path}: corrupt or not a statistics file; make it again with "
            "`lrquant stats`"
        ) from error
    well_formed = isinstance(values, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) and tensor.dim() == 1
        for name, tensor in values.items()
    )
    if not well_formed:
        raise LRQuantError(
            f"statistics {path}: expected a mapping from linear names to one value a channel"
        )
    for name, tensor in values.items():
        if not torch.isfinite(tensor).all():
            raise LRQuantError(f"statistics {path}: {name} holds a value that is not finite")
    return {name: tensor.float() for name, tensor in values.items()}


logger = logging.getLogger("lrquant")


def given_statistics(files: StatisticsFiles, wanted: bool) -> ChannelStatistics | None:
    """What the files hold, None without any, or if what is learned makes no use of it.

    They are read, and refused, even where they are not `wanted`.
    """
    if files.maxima is None:
        return None
    shifts = None if files.midpoints is None else Path(files.midpoints)
    statistics = load_statistics(Path(files.maxima), shifts)
    if not wanted:
        return None
    logger.info("statistics %s", ", ".join(files.named))
    return statistics
