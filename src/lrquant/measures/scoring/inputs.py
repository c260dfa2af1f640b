"""A set's inputs, which the first of several processes has read, and what all make of them."""

from __future__ import annotations

from typing import Protocol, TypeVar

from lrquant.data.feeds import Feed
from lrquant.team.team import Team

V = TypeVar("V")


class WithInputs(Protocol):
    """A set as a model's inputs."""

    feed: Feed


def feed_of(asked: WithInputs | None) -> Feed:
    """The inputs of a set, where there is one: no other process asks."""
    assert asked is not None
    return asked.feed


def own_batches(feed: Feed, size: int, team: Team) -> list[slice]:
    """A member's share of the batches of so many."""
    return feed.slices(size)[team.rank :: team.size]


def joined(team: Team, own: dict[int, V]) -> dict[int, V]:
    """What all members have, each its `own`, by number."""
    return {number: value for each in team.each(own) for number, value in each.items()}
