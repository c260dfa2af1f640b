"""A set's inputs, which the first of several processes has read."""

from __future__ import annotations

from typing import Protocol

from lrquant.data.feeds import Feed


class WithInputs(Protocol):
    """A set as a model's inputs."""

    feed: Feed


def feed_of(asked: WithInputs | None) -> Feed:
    """The inputs of a set, where there is one: no other process asks."""
    assert asked is not None
    return asked.feed
