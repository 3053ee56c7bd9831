"""Which block leaves when a place is full. A policy orders keys; it knows nothing of slots, bytes or time.

    insert(key) ──> small (half) ──hit──> main ──hit──> main again, one hit poorer
                      │ not hit             │ not hit
                      ├──────────┬──────────┘
                      │          └──> has blocks after it: the end of its chain goes in its stead, else it goes
                      └──> out, remembered in the ghost
    insert(key in the ghost) ──> main

`S3Fifo` resists scans: blocks that come once (a long cold prompt) pass through the small queue and leave it again while the
main queue, where the hot set lives, is not touched. What is asked for again soon after it left goes straight to main.

Order within a chain: a block is worth nothing without those before it. Whoever inserts a chain inserts it tail first
(`kvshare.store.Store.commit` does), which is enough for chains that come once. `follow` tells the policy how keys follow each
other; of what it was told a block is never evicted while one after it is held: whose turn it is with blocks after it lets the
end of its chain go first, and waits.

The usual small queue of a tenth suits web objects; conversations come back once, after a while: half does better on the
Mooncake conversation trace at every size. The table, what the optimum reaches, and what was tried and did no better:
`docs/decisions/0015-placement.md`.

What an implementor guarantees: every method is O(1) amortised and atomic (when `evict` returns None nothing changed), a key is
held at most once, `evict` returns only keys that are held. Threads: none; one caller.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import pairwise

SMALL_SHARE = 2  # the small queue may hold one in so many keys before it gives way
HITS_MAX = 3  # hits that are remembered; more would only delay the end of what was hot once
EXPECTED_MIN = 1 << 14  # keys that are not held and whose place in a chain is remembered, in the smallest cache


class Policy(ABC):
    """Orders the keys of a store by what should leave first."""

    @abstractmethod
    def insert(self, key: bytes) -> None:
        """A key that is not held comes in."""

    def insert_all(self, keys: Iterable[bytes]) -> None:
        """`insert` of many, in this order."""
        for key in keys:
            self.insert(key)

    @abstractmethod
    def remove(self, key: bytes) -> None:
        """A held key goes for a reason that says nothing of its worth (dropped, corrupt): it is not remembered."""

    @abstractmethod
    def touch(self, key: bytes) -> None:
        """A key was used. Unknown keys are ignored: a lookup may outlive its block."""

    @abstractmethod
    def follow(self, chain: Sequence[bytes]) -> None:
        """Each of these keys follows the one before it, in every chain. Held or not: what is not may be inserted soon."""

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


class Chains:
    """How held keys follow each other: a forest. A key knows its parent whether that is held or not, so a parent that comes
    later, or again, finds its children. Parents of keys that are not held are remembered for a while."""

    def __init__(self) -> None:
        self._parents: dict[bytes, bytes] = {}  # of held keys
        self._children: dict[bytes, dict[bytes, None]] = {}  # held ones, in order of their coming
        self._expected: OrderedDict[bytes, bytes] = OrderedDict()  # key that is not held -> parent
        self._descents: dict[bytes, bytes] = {}  # held key -> where below it `end_below` found the last end

    def __len__(self) -> int:
        """Keys whose parents are known."""
        return len(self._parents) + len(self._expected)

    def follow(self, key: bytes, parent: bytes, held: bool) -> None:
        if not held:
            self._expected[key] = parent
        elif key not in self._parents:
            self._link(key, parent)

    def insert(self, key: bytes) -> None:
        parent = self._expected.pop(key, None)
        if parent is not None:
            self._link(key, parent)

    def remove(self, key: bytes) -> None:
        """A key is not held any more. Its children, if there are any, stay its children."""
        self._descents.pop(key, None)
        parent = self._parents.pop(key, None)
        if parent is not None:
            siblings = self._children[parent]
            del siblings[key]
            if not siblings:
                del self._children[parent]

    def end_below(self, key: bytes) -> bytes:
        """The end of a chain through this held key: itself where nothing follows. Asked again and again while each end that it
        names is removed, it walks every chain once."""
        end = self._descents.get(key, key)
        if end not in self._parents:
            end = key  # where it stopped is not held any more
        start = end
        while end in self._children:
            end = next(iter(self._children[end]))
            if end == start:
                return key  # hashes make no circles: somebody told us of one
        if end != key:
            self._descents[key] = self._parents[end]
        return end

    def trim(self, expected_max: int) -> None:
        while len(self._expected) > expected_max:
            self._expected.popitem(last=False)

    def check(self, held: Policy) -> list[str]:
        problems = [f"key {key.hex()} follows another and is not held" for key in self._parents if key not in held]
        problems += [f"key {key.hex()} is held and expected" for key in self._expected if key in held]
        problems += [f"key {key.hex()} was descended from and is not held" for key in self._descents if key not in held]
        pairs = {(child, parent) for parent, children in self._children.items() for child in children}
        if pairs != set(self._parents.items()) or any(not children for children in self._children.values()):
            problems.append("parents by child and children by parent differ")
        return problems

    def _link(self, key: bytes, parent: bytes) -> None:
        self._parents[key] = parent
        self._children.setdefault(parent, {})[key] = None


class S3Fifo(Policy):
    """Three queues, first in first out (Yang et al., SOSP'23), that know chains. See the module's docstring."""

    def __init__(self) -> None:
        self._small: OrderedDict[bytes, int] = OrderedDict()  # key -> hits
        self._main: OrderedDict[bytes, int] = OrderedDict()
        self._ghost: OrderedDict[bytes, None] = OrderedDict()  # never more than there are keys held
        self._chains = Chains()

    def insert(self, key: bytes) -> None:
        assert key not in self
        self._chains.insert(key)
        if key in self._ghost:
            del self._ghost[key]
            self._main[key] = 0
        else:
            self._small[key] = 0

    def insert_all(self, keys: Iterable[bytes]) -> None:
        if self._ghost or self._chains or self:
            super().insert_all(keys)
            return
        small = self._small  # new, with nothing to remember of any key: at a disk's start there may be millions
        for key in keys:
            small[key] = 0

    def remove(self, key: bytes) -> None:
        queue = self._small if key in self._small else self._main
        del queue[key]
        self._chains.remove(key)
        self._trim_ghost()

    def touch(self, key: bytes) -> None:
        for queue in (self._small, self._main):
            if key in queue:
                queue[key] = min(queue[key] + 1, HITS_MAX)
                return

    def follow(self, chain: Sequence[bytes]) -> None:
        for parent, key in pairwise(chain):
            self._chains.follow(key, parent, key in self)
        self._chains.trim(max(EXPECTED_MIN, len(self)))

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
        problems = self._chains.check(self)
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
        end = self._take_end(self._small, key)
        self._ghost[end] = None
        self._trim_ghost()
        return end

    def _evict_main(self) -> bytes | None:
        key, hits = self._main.popitem(last=False)
        if hits:
            self._main[key] = hits - 1
            return None
        end = self._take_end(self._main, key)
        self._trim_ghost()
        return end

    def _take_end(self, queue: OrderedDict[bytes, int], key: bytes) -> bytes:
        """``key`` was taken from the front of ``queue``: it goes, or goes back and the end of a chain through it goes."""
        end = self._chains.end_below(key)
        if end != key:
            queue[key] = 0
            queue.move_to_end(key, last=False)
            # In whichever queue: whoever asked for it asked for the key as well.
            del (self._small if end in self._small else self._main)[end]
        self._chains.remove(end)
        return end

    def _trim_ghost(self) -> None:
        while len(self._ghost) > len(self):
            self._ghost.popitem(last=False)

    def _ghosts_held(self) -> set[bytes]:
        return {key for key in self._ghost if key in self}
