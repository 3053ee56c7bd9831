"""Joiners that ask for their plan at about the same time are gathered, so that one donor broadcasts to all of them.

    come, come, come ─ enough ──> host: a donor is asked ──> hosted: a Plan for each, ranks 1 ..
          │                             │
          └ too few came in time        └ refusal, silence, a loss ──> overdue, or left over: everybody gets a plan of its own

A pure state machine, part of the directory's: time is an argument, connections are numbers, messages are its values.

Threads: none; one caller.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from kvshare.cluster_messages import AskPlan, Host, Hosted, Plan
from kvshare.places import WarmItem

HOSTED_SECONDS = 1.0  # a donor answers within this: it only has to listen


@dataclass(frozen=True)
class Waiting:
    """A node's question for a plan that has not been answered."""

    connection: int
    ask: AskPlan


@dataclass
class _Gathering:
    """Of one family. Joiners wait until ``deadline`` for others."""

    deadline: float
    waiting: list[Waiting]


@dataclass
class _Hosting:
    """A group whose donor was asked at ``began`` and answers until ``deadline``. ``whole``: nobody has left."""

    donor: int
    waiting: list[Waiting]
    items: list[WarmItem]
    present: int
    began: float
    deadline: float
    whole: bool = True


class Gatherings:
    """See the module's docstring. ``ranks``: joiners that make a group; 0: there are none. ``seconds``: from the first one's
    coming to the last one's."""

    def __init__(self, ranks: int, seconds: float) -> None:
        self.ranks = ranks
        self._seconds = seconds
        self._gatherings: dict[bytes, _Gathering] = {}  # by family
        self._hostings: dict[int, _Hosting] = {}  # by the number of our question
        self._asks = itertools.count(1)

    def deadlines(self) -> Iterator[float]:
        """When `overdue` has something to say."""
        for gathering in self._gatherings.values():
            yield gathering.deadline
        for hosting in self._hostings.values():
            yield hosting.deadline

    def connections(self) -> set[int]:
        """All that wait."""
        open_ones = [each.connection for gathering in self._gatherings.values() for each in gathering.waiting]
        return {each.connection for hosting in self._hostings.values() for each in hosting.waiting}.union(open_ones)

    def come(self, joiner: Waiting, now: float) -> list[Waiting]:
        """One more joiner; returns all of a group when it is complete. One that asks again takes its own place."""
        gathering = self._gatherings.setdefault(joiner.ask.family, _Gathering(now + self._seconds, []))
        gathering.waiting = [each for each in gathering.waiting if each.connection != joiner.connection] + [joiner]
        if len(gathering.waiting) < self.ranks:
            return []
        del self._gatherings[joiner.ask.family]
        return gathering.waiting

    def host(self, donor: int, waiting: list[Waiting], items: list[WarmItem], present: int, now: float) -> Host:
        """The question to a donor, ``items`` being what it shall give to all of these."""
        ask = next(self._asks)
        self._hostings[ask] = _Hosting(donor, list(waiting), items, present, now, now + HOSTED_SECONDS)
        return Host(ask, len(waiting) + 1, items)

    def hosted(self, connection: int, answer: Hosted) -> tuple[list[tuple[int, Plan]], list[Waiting]]:
        """A donor answered: connections with their plans of a group, or joiners that need plans of their own. Neither when
        nobody asked that, or does not wait any more."""
        hosting = self._hostings.get(answer.ask)
        if hosting is None or hosting.donor != connection:
            return [], []
        del self._hostings[answer.ask]
        group, waiting = answer.group, hosting.waiting
        if group is None or not hosting.whole or group.ranks != len(waiting) + 1:
            return [], waiting
        plans = [
            (each.connection, Plan(each.ask.ask, hosting.items, hosting.present, group.for_rank(rank)))
            for rank, each in enumerate(waiting, 1)
        ]
        return plans, []

    def leave(self, connection: int) -> None:
        """A connection is gone: it waits no longer, and a group that it should have been part of is `overdue`."""
        for family, gathering in list(self._gatherings.items()):
            gathering.waiting = [each for each in gathering.waiting if each.connection != connection]
            if not gathering.waiting:
                del self._gatherings[family]
        for hosting in self._hostings.values():
            left = [each for each in hosting.waiting if each.connection != connection]
            if hosting.donor == connection or len(left) < len(hosting.waiting):
                # A group has fixed ranks.
                hosting.waiting, hosting.whole, hosting.deadline = left, False, hosting.began

    def overdue(self, now: float) -> list[Waiting]:
        """Joiners that have waited in vain: they need plans of their own."""
        late: list[Waiting] = []
        for family, gathering in list(self._gatherings.items()):
            if gathering.deadline <= now:
                late += self._gatherings.pop(family).waiting
        for ask, hosting in list(self._hostings.items()):
            if hosting.deadline <= now:
                late += self._hostings.pop(ask).waiting
        return late
