"""Places where a scale and a shift can move from a producer into its consumers.

A site owns one learnable vector s.  Each of its folds says which module carries a power of s, along
which axis, and which element of s belongs to each channel: enough to scale the weights, to check in
float64 that the model's function is unchanged, and to reduce statistics to the length of s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from lrquant.config.choices import Kind

UNTOUCHED = -1


@dataclass(frozen=True)
class Fold:
    """`module`'s channels along `axis` are multiplied by ``s[index] ** power``.

    "rows": output channels of a linear and its bias; "columns": input channels of a linear;
    "norm": the elementwise weight and bias of a norm, whose stored weight is what it multiplies
    with less `offset` (some store weight - 1).  A channel with index `UNTOUCHED` stays as it is.
    """

    module: str
    axis: Literal["rows", "columns", "norm"]
    power: Literal[-1, 1, 2]
    index: tuple[int, ...]
    offset: float = 0.0

    @cached_property
    def in_order(self) -> bool:
        """Whether every channel has the element of its own number."""
        return self.index == tuple(range(len(self.index)))


@dataclass(frozen=True)
class Site:
    """One learnable scale vector of `size` elements and where it goes.

    `measured` is the linear whose input statistics initialise it (None: it starts at 1);
    `shiftable` says that subtracting a shift from the producer's bias and adding ``W shift`` to the
    consumers' keeps the function, whatever module holds the bias.
    """

    name: str
    kind: Kind
    size: int
    folds: tuple[Fold, ...]
    measured: str | None
    shiftable: bool

    @property
    def producer(self) -> Fold:
        """The fold that divides by s (for q and k: the query side)."""
        return self.folds[0]

    @property
    def consumers(self) -> tuple[Fold, ...]:
        """The folds that multiply by s."""
        return self.folds[1:]


def norm_site(
    norm: str,
    consumers: tuple[str, ...],
    hidden_size: int,
    offset: float = 0.0,
    measured: str | None = None,
) -> Site:
    """Norm -> every linear that reads its output; all of them must be named.

    `measured` is the linear of which the first consumer is a part.
    """
    identity = tuple(range(hidden_size))
    folds = [Fold(norm, "norm", -1, identity, offset)]
    folds += [Fold(consumer, "columns", 1, identity) for consumer in consumers]
    measured = measured or consumers[0]
    return Site(norm, "norm", hidden_size, tuple(folds), measured, shiftable=True)


def gated_norm_site(norm: str, output: str, head_dim: int, heads: int = 1) -> Site:
    """Norm -> output projection of a mixer, where a gate stands between them.

    The norm's weight, of `head_dim` channels, is that of each of the `heads`.
    """
    identity = tuple(range(head_dim))
    folds = (Fold(norm, "norm", -1, identity), Fold(output, "columns", 1, identity * heads))
    return Site(norm, "norm", head_dim, folds, output, shiftable=False)


def value_output_site(
    value: str,
    output: str,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rows: int = 0,
    grouped: bool = False,
    shiftable: bool = True,
) -> Site:
    """v_proj -> o_proj: one scale per (kv head, channel), repeated over its group's query heads.

    `rows` of `value` come before those of the values, as in a fused projection; `grouped` says that
    it holds, for each kv head, the rows of its queries, its key and its value.  What scales the
    output, or takes from the sum of its weights, between the two leaves no place for a shift.
    """
    size = kv_heads * head_dim
    repeats = heads // kv_heads
    columns = tuple(
        (head // repeats) * head_dim + channel
        for head in range(heads)
        for channel in range(head_dim)
    )
    of_value = (UNTOUCHED,) * rows + tuple(range(size))
    if grouped:
        queries, keys = (UNTOUCHED,) * (heads * head_dim), (UNTOUCHED,) * size
        of_value = _joined((queries, keys, tuple(range(size))), kv_heads)
    folds = (Fold(value, "rows", -1, of_value), Fold(output, "columns", 1, columns))
    return Site(output, "value_output", size, folds, output, shiftable)


def _joined(parts: Sequence[tuple[int, ...]], groups: int) -> tuple[int, ...]:
    """Parts of a linear's rows in the order in which it has them: one share of each, a group."""
    rows: list[int] = []
    for group in range(groups):
        for part in parts:
            share = len(part) // groups
            rows += part[group * share : (group + 1) * share]
    return tuple(rows)


def query_key_site(
    query: str,
    key: str,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rotary: str | None,
    rotary_dim: int | None = None,
    grouped: bool = False,
) -> Site:
    """q / t and k * t, t per kv head and, under RoPE, per pair of channels rotated together.

    `rotary`: None without RoPE, "half" where channels i and i + rotary_dim/2 turn together,
    "interleaved" where neighbours do; those after the first `rotary_dim`, by default all, do not
    turn.  `query` and `key` may be one linear, which then holds the rows of the queries, the keys
    and the values in this order, for each kv head on its own if `grouped`.
    """
    turned = head_dim if rotary_dim is None else rotary_dim
    half = turned // 2
    pair = {
        None: tuple(range(head_dim)),
        "half": tuple(channel % half for channel in range(turned)),
        "interleaved": tuple(channel // 2 for channel in range(turned)),
    }[rotary]
    pair += tuple(half + channel for channel in range(head_dim - len(pair)))
    width = max(pair) + 1
    repeats = heads // kv_heads
    of_query = tuple((head // repeats) * width + p for head in range(heads) for p in pair)
    of_key = tuple(head * width + p for head in range(kv_heads) for p in pair)
    if query == key:
        queries, keys = (UNTOUCHED,) * len(of_query), (UNTOUCHED,) * len(of_key)
        groups = kv_heads if grouped else 1
        of_query, of_key = (
            _joined((of_query, keys, keys), groups),
            _joined((queries, of_key, keys), groups),
        )
    folds = (Fold(query, "rows", -1, of_query), Fold(key, "rows", 1, of_key))
    return Site(f"{query}:{key}", "query_key", kv_heads * width, folds, None, shiftable=False)


def chain_site(first: str, readers: Sequence[str], width: int, measured: str | None = None) -> Site:
    """A linear -> those that alone read it, with nothing between: of a lower rank, say.

    `measured` is the module of which the first reader is a part.
    """
    identity = tuple(range(width))
    folds = [Fold(first, "rows", -1, identity)]
    folds += [Fold(reader, "columns", 1, identity) for reader in readers]
    return Site(first, "up_down", width, tuple(folds), measured or readers[0], shiftable=False)


def up_down_site(up: str, down: str, width: int, power: Literal[1, 2] = 1) -> Site:
    """up_proj -> down_proj of a gated MLP, or fc1 -> fc2 with ReLU, to a `power`, between them."""
    identity = tuple(range(width))
    folds = (Fold(up, "rows", -1, identity), Fold(down, "columns", power, identity))
    return Site(down, "up_down", width, folds, down, shiftable=False)
