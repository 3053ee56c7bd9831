"""Which block leaves when an arena is full. A policy orders keys; it knows nothing of slots, bytes or time.

    insert(key) ──> small (half) ──hit──> main ──hit──> main again, one hit poorer
                      │ not hit             │ not hit
                      └──> out, remembered  └──> out
                           in the ghost
    insert(key in the ghost) ──> main

`S3Fifo` resists scans: blocks that come once (a long cold prompt) pass through the small queue and leave it again while the
main queue, where the hot set lives, is not touched. What is asked for again soon after it left goes straight to main.

The usual small queue of a tenth suits web objects; conversations come back once, after a while. Replaying the Mooncake
conversation trace (12,031 requests, FAST'25; ceiling 36.6 %), prefix hits in percent of blocks for caches of so many blocks:

    blocks               1,000   3,000   10,000   20,000   30,000   45,000
    LRU                    4.5     6.5     21.1     28.8     32.6     35.3
    small a tenth          5.6     9.4     19.8     25.3     30.4     34.3
    small half (this)      5.7    10.1     22.8     29.9     32.3     34.4

Order within a chain: a chain is of use from its head only, so its tail must leave first. Queues are first in, first out;
whoever inserts a chain inserts it tail first (`kvshare.store.Store.commit` does).

What an implementor guarantees: every method is O(1) amortised and atomic (when `evict` returns None nothing changed), a key is
held at most once, `evict` returns only keys that are held. Threads: none; one caller.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict

SMALL_SHARE = 2  # the small queue may hold one in so many keys before it gives way
HITS_MAX = 3  # hits that are remembered; more would only delay the end of what was hot once


class Policy(ABC):
    """Orders the keys of a store by what should leave first."""

    @abstractmethod
    def insert(self, key: bytes) -> None:
        """A key that is not held comes in."""

    @abstractmethod
    def remove(self, key: bytes) -> None:
        """A held key goes for a reason that says nothing of its worth (dropped, corrupt): it is not remembered."""

    @abstractmethod
    def touch(self, key: bytes) -> None:
        """A key was used. Unknown keys are ignored: a lookup may outlive its block."""

    @abstractmethod
    def evict(self) -> bytes | None:
        """Take out the key that should leave first and return it; None when nothing is held."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __contains__(self, key: bytes) -> bool: ...

    @abstractmethod
    def check(self) -> list[str]:
        """Problems found, one sentence each; empty when all is well."""


class S3Fifo(Policy):
    """Three queues, first in first out (Yang et al., SOSP'23). See the module's docstring."""

    def __init__(self) -> None:
        self._small: OrderedDict[bytes, int] = OrderedDict()  # key -> hits
        self._main: OrderedDict[bytes, int] = OrderedDict()
        self._ghost: OrderedDict[bytes, None] = OrderedDict()  # never more than there are keys held

    def insert(self, key: bytes) -> None:
        assert key not in self
        if key in self._ghost:
            del self._ghost[key]
            self._main[key] = 0
        else:
            self._small[key] = 0

    def remove(self, key: bytes) -> None:
        queue = self._small if key in self._small else self._main
        del queue[key]
        self._trim_ghost()

    def touch(self, key: bytes) -> None:
        for queue in (self._small, self._main):
            if key in queue:
                queue[key] = min(queue[key] + 1, HITS_MAX)
                return

    def evict(self) -> bytes | None:
        if not self:
            return None
        while True:
            # Every turn but the last moves a key to main or takes a hit from one there: no more turns than there were hits.
            small_over = len(self._small) * SMALL_SHARE > len(self)
            key = self._evict_small() if self._small and (small_over or not self._main) else self._evict_main()
            if key is not None:
                return key

    def __len__(self) -> int:
        return len(self._small) + len(self._main)

    def __contains__(self, key: object) -> bool:
        return key in self._small or key in self._main

    def check(self) -> list[str]:
        problems = []
        for name, keys in (("both queues", self._small.keys() & self._main.keys()), ("ghost and queue", self._ghosts_held())):
            problems += [f"key {key.hex()} is in {name}" for key in keys]
        if len(self._ghost) > len(self):
            problems.append(f"the ghost remembers {len(self._ghost)} keys, more than the {len(self)} that are held")
        for key, hits in [*self._small.items(), *self._main.items()]:
            if not 0 <= hits <= HITS_MAX:
                problems.append(f"key {key.hex()} has {hits} hits")
        return problems

    def _evict_small(self) -> bytes | None:
        key, hits = self._small.popitem(last=False)
        if hits:
            self._main[key] = 0
            return None
        self._ghost[key] = None
        self._trim_ghost()
        return key

    def _evict_main(self) -> bytes | None:
        key, hits = self._main.popitem(last=False)
        if hits:
            self._main[key] = hits - 1
            return None
        self._trim_ghost()
        return key

    def _trim_ghost(self) -> None:
        while len(self._ghost) > len(self):
            self._ghost.popitem(last=False)

    def _ghosts_held(self) -> set[bytes]:
        return {key for key in self._ghost if key in self}
