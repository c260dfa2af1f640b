"""The main figures of a run as lines of text: quality, or what learning did where none is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

from lrquant.measures.choice import measures
from lrquant.measures.rows import RunResults, labels_of
from lrquant.runs.block_file import BlockRecord
from lrquant.runs.results import Results


def quality(results: Results, records: Sequence[BlockRecord]) -> Iterator[str]:
    """Measures beside full precision and round-to-nearest; without any, what learning did."""
    seen = RunResults(results, labels_of(results))
    tiles = [tile for measure in measures() for tile in measure.tiles(seen)]
    for tile in tiles:
        yield f"{tile.label}: {tile.value}" + (f" ({tile.note})" if tile.note else "")
    if not tiles:
        yield "not measured" + _falls(records)


def _falls(records: Sequence[BlockRecord]) -> str:
    """How far learning brought the losses of blocks down."""
    learned = [record for record in records if record.epoch_losses and record.initial_loss > 0]
    if not learned:
        return ""
    fall = 1 - median(record.final_loss / record.initial_loss for record in learned)
    kept = sum(record.best_epoch == 0 for record in learned)
    note = f", {kept} of {len(learned)} kept their start" if kept else ""
    return f"; learning took {fall:.0%} off the median block's loss{note}"
