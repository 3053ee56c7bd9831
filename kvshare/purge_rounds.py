"""The directory's purges: every node is asked, answers are gathered, and who was away is asked when he comes back.

    AskPurge ─> Erase to every node ─> Erased from each ─> all answered, lost, or late ─> PurgeDone to the asker
    Join ─────> a Welcome that names the purges which that node has not done yet

A part of `kvshare.directory`, as pure as that: connections are numbers, time is an argument. What is remembered (the latest
`REMEMBERED_MAX` purges, and who has done them) is lost when the directory ends.

Threads: none; one caller.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from kvshare.cluster_messages import AskPurge, Erase, Erased, PurgeDone
from kvshare.purge import NodePurge

REMEMBERED_MAX = 1000
GATHER_SECONDS = 30.0  # a node that takes longer is named as one that did not answer


@dataclass
class _Purge:
    """``done``: names of the nodes that have carried it out."""

    erase: Erase
    done: set[str] = field(default_factory=set)


@dataclass
class _Round:
    """An asker who waits, for these nodes (connection -> name) until ``deadline``."""

    connection: int
    ask: int
    waiting: dict[int, str]
    deadline: float
    answers: list[NodePurge] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)


class PurgeRounds:
    """See the module's docstring. ``epoch``: of the directory, so that its numbers are no other's."""

    def __init__(self, epoch: int) -> None:
        self._numbers = itertools.count(epoch)
        self._purges: OrderedDict[int, _Purge] = OrderedDict()  # by number, oldest first
        self._rounds: dict[int, _Round] = {}  # by the same number

    def deadlines(self) -> Iterator[float]:
        """When `overdue` has something to say."""
        return (each.deadline for each in self._rounds.values())

    def begin(self, connection: int, ask: AskPurge, nodes: Mapping[int, str], now: float) -> Erase:
        """A node asks; ``nodes``: all that are here, by connection, and shall be sent what this returns."""
        number = next(self._numbers)
        erase = Erase(number, ask.scope, ask.destroy_key)
        self._purges[number] = _Purge(erase)
        if len(self._purges) > REMEMBERED_MAX:
            self._purges.popitem(last=False)
        self._rounds[number] = _Round(connection, ask.ask, dict(nodes), now + GATHER_SECONDS)
        return erase

    def missed(self, name: str) -> list[Erase]:
        """Purges that this node, which just joined, has not carried out."""
        return [purge.erase for purge in self._purges.values() if name not in purge.done]

    def erased(self, connection: int, answer: Erased) -> list[tuple[int, PurgeDone]]:
        """A node has carried one out: what is to be sent to whom."""
        purge, round_ = self._purges.get(answer.number), self._rounds.get(answer.number)
        if purge is not None:
            purge.done.add(answer.result.node)
        if round_ is None or round_.waiting.pop(connection, None) is None:
            return []
        round_.answers.append(answer.result)
        return self._end(answer.number) if not round_.waiting else []

    def leave(self, connection: int) -> list[tuple[int, PurgeDone]]:
        """A connection is gone: it will not answer, and what it asked nobody wants to know."""
        done: list[tuple[int, PurgeDone]] = []
        for number, round_ in list(self._rounds.items()):
            if round_.connection == connection:
                del self._rounds[number]
                continue
            name = round_.waiting.pop(connection, None)
            if name is not None:
                round_.silent.append(name)
                done += self._end(number) if not round_.waiting else []
        return done

    def overdue(self, now: float) -> list[tuple[int, PurgeDone]]:
        """Rounds that have waited long enough."""
        late = [number for number, round_ in self._rounds.items() if round_.deadline <= now]
        return [told for number in late for told in self._end(number)]

    def connections(self) -> set[int]:
        """All that wait or are waited for."""
        return {each for round_ in self._rounds.values() for each in (round_.connection, *round_.waiting)}

    def _end(self, number: int) -> list[tuple[int, PurgeDone]]:
        round_ = self._rounds.pop(number)
        silent = sorted([*round_.silent, *round_.waiting.values()])
        return [(round_.connection, PurgeDone(round_.ask, sorted(round_.answers, key=lambda each: each.node), silent))]
