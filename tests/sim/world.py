"""Virtual time, chance and judgement: what everything in a simulated cluster shares.

Time is a heap of actions; whatever has to do with chance is drawn from one seeded source, in the order in which things happen.
So the same seed plays the same play, and the digest of all that the directories heard tells whether it did.

A rule that is broken is a `Broken`: the play ends there, with the time and the seed in its text.

Threads: none.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable

Action = Callable[[], object]


class Broken(Exception):
    """An invariant of the cluster does not hold."""


class World:
    """Starts at second 0. ``counts``: how often what happened, so that a test can see that its storm was one."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.now = 0.0
        self.events = 0
        self.counts: Counter[str] = Counter()
        self._queue: list[tuple[float, int, Action]] = []
        self._numbers = itertools.count()
        self._history = hashlib.blake2b(digest_size=16)

    def later(self, seconds: float, action: Action) -> None:
        heapq.heappush(self._queue, (self.now + seconds, next(self._numbers), action))

    def soon(self, least: float, most: float, action: Action) -> None:
        """Between so many seconds from now."""
        self.later(self.random.uniform(least, most), action)

    def run(self, seconds: float) -> None:
        """So many seconds of virtual time."""
        until = self.now + seconds
        while self._queue and self._queue[0][0] <= until:
            self.now, _, action = heapq.heappop(self._queue)
            self.events += 1
            action()
        self.now = until

    def note(self, *what: bytes | str | int) -> None:
        """Part of the history."""
        self._history.update(repr((round(self.now, 9), what)).encode())

    @property
    def history(self) -> str:
        return self._history.hexdigest()

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def require(self, holds: bool, text: str) -> None:
        if not holds:
            raise Broken(f"seed {self.seed}, second {self.now:.3f}: {text}")
