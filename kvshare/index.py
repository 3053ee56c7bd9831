"""The directory's index: which nodes hold a key, and where. `Index` is what is asked of it.

Threads: none; one caller.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvshare import _index
from kvshare.fingerprints import ALL_PARTS, PARTS, hashes_of
from kvshare.places import Location
from kvshare.runs import Keys, Place, Places, Run, count_of, keys_of

LOCATIONS_PER_KEY = 2  # on average: memory follows locations, so these are limited too
SLOTS_MAX = 1 << 28  # of a region: blocks in later ones are refused
RANK_NEVER = 255  # in ``ranks``: not to be told
NODES_MAX = 65_535
NUMBER_MAX, EXPIRES_MAX = (1 << 63) - 1, (1 << 32) - 1  # of regions and lengths; of seconds since 2020
SWEEP_BANKS = 1  # of 256 that memory is divided into: with 100 million locations a few milliseconds


class Index(Protocol):
    """What the directory asks of an index. A question changes nothing.

    Keys are known by their hashes (`hashes_of`), cut into `PARTS` parts of equal size, by which nodes and directory compare
    what they know (`digests`) and repair only what differs.
    """

    def add(self, node: str, runs: Sequence[Run]) -> int:
        """``node`` holds these blocks now, where they say (again: they have moved). Well-formed runs. Returns how many were
        refused for want of room; a refused block is simply not known."""

    def remove(self, node: str, keys: Sequence[Keys]) -> None:
        """``node`` no longer holds these. Unknown ones are ignored: they may have been refused."""

    def drop(self, node: str, parts: int = ALL_PARTS) -> None:
        """Forget all that ``node`` held, or what of it lies in the parts whose bits are set. This takes no time: it is gone for
        everybody at once, and its memory is taken back bit by bit, by `sweep`."""

    def sweep(self) -> bool:
        """Take back some of the memory of dropped nodes: a bounded step. False when nothing is left to be taken."""

    def places(self) -> Sequence[Place | None]:
        """All that locations have in common, by number: ``ranks`` of `find` are in this order. None: a number that is free. The
        same object as long as no number is given or freed, never changed: who keeps ranks compares by ``is``."""

    def find(self, keys: Sequence[Keys], ranks: npt.NDArray[np.uint8] | None = None, locations_max: int = 3) -> Places:
        """Where these keys are, in their order: of each up to ``locations_max`` (below 256) locations, those of lowest rank
        first, among equals the freshest first. ranks: uint8 for each of `places`; `RANK_NEVER`: not to be told."""

    def held(self, keys: Sequence[Keys]) -> int:
        """How many leading ones of these keys are held, each by anybody."""

    def depths(self, keys: Sequence[Keys]) -> dict[str, int]:
        """For each node that holds the first of these keys: how many leading ones it holds."""

    def holds(self, node: str, keys: Sequence[Keys]) -> npt.NDArray[np.bool_]:
        """For each of these keys: does ``node`` hold it?"""

    def locate(self, keys: Sequence[bytes], exclude: str, locations_max: int) -> list[list[Location]]:
        """`find` for a few whole keys: freshest first, none of them on ``exclude``."""

    def holders(self, key: bytes) -> Sequence[str]:
        """The names of all who hold a key, freshest first."""

    def nodes(self) -> Set[str]:
        """Who holds anything."""

    def digests(self, node: str) -> npt.NDArray[np.uint64]:
        """uint64 [PARTS]: for each part the sum of `digest` over what ``node`` holds there. Equal inventories, equal sums."""

    def locations(self) -> int:
        """How many pairs of key and node are known."""

    def check(self) -> list[str]:
        """Problems found, one sentence each; empty when all is well. Reads everything."""

    def __len__(self) -> int:
        """How many keys are known. One that only dropped nodes held counts until `sweep` finds it."""


class CompactIndex:
    """An `Index` of at most ``keys_max`` keys and twice as many locations, in tables of 23.5 bytes a location (where there are
    millions) that `kvshare._index` keeps. ``seed``: `index_seed`.

    What has no room is refused: besides keys and locations that are too many, slots from `SLOTS_MAX` on, a node's places beyond
    1,024, and all that have numbers too large for a column.
    """

    def __init__(self, keys_max: int, seed: int = 0) -> None:
        assert keys_max >= 1
        self._seed = seed
        self._table = _index.Memberships(keys_max, keys_max * LOCATIONS_PER_KEY)
        self._numbers: dict[str, int] = {}
        self._names: list[str | None] = []  # by number
        self._free: list[int] = []
        self._dropped: set[str] = set()  # that may still have rows, and so need their numbers
        self._places: list[Place | None] = []
        self._places_version = -1

    def __len__(self) -> int:
        return self._table.totals()[0]

    def locations(self) -> int:
        _, entries, dead, _, _ = self._table.totals()
        return entries - dead

    def memory_bytes(self) -> int:
        """What the tables take, all slack included."""
        return self._table.totals()[3]

    def nodes(self) -> Set[str]:
        return {node for node, number in self._numbers.items() if self._table.about(number)[0] > 0}

    def places(self) -> Sequence[Place | None]:
        version = self._table.version()
        if version != self._places_version:
            names = self._names
            self._places = [found and Place(str(names[found[0]]), *found[1:]) for found in self._table.places()]
            self._places_version = version
        return self._places

    # --- what changes it ----------------------------------------------------------------------------------------------

    def add(self, node: str, runs: Sequence[Run]) -> int:
        fitting = [run for run in runs if len(run) and max(run.region, run.length) <= NUMBER_MAX and run.expires <= EXPIRES_MAX]
        number = self._number(node) if fitting else None
        if number is None:
            return count_of(runs)
        refused = count_of(runs) - count_of(fitting)
        for run in fitting:
            hashes = hashes_of([run.keys], self._seed)
            refused += self._table.add(number, hashes, run.region, run.length, run.expires, run.slots, run.generations)
        if refused:
            self._release(node)
        return refused

    def remove(self, node: str, keys: Sequence[Keys]) -> None:
        if node in self._numbers:
            self._table.remove(self._numbers[node], hashes_of(keys, self._seed))
            self._release(node)

    def drop(self, node: str, parts: int = ALL_PARTS) -> None:
        if node in self._numbers:
            self._table.drop(self._numbers[node], parts)
            self._dropped.add(node)
            self._release(node)

    def sweep(self) -> bool:
        if self._table.sweep(SWEEP_BANKS):
            return True
        for node in list(self._dropped):
            self._release(node)
        self._dropped.clear()
        return False

    def _number(self, node: str) -> int | None:
        """The number of a node; None: there are too many."""
        number = self._numbers.get(node)
        if number is not None:
            return number
        if not self._free and len(self._names) >= NODES_MAX:
            return None
        number = self._free.pop() if self._free else len(self._names)
        self._names[number : number + 1] = [node]
        self._numbers[node] = number
        return number

    def _release(self, node: str) -> None:
        """The number of a node that has no row any more is free."""
        number = self._numbers.get(node)
        if number is not None and self._table.about(number)[1] == 0:
            del self._numbers[node]
            self._names[number] = None
            self._free.append(number)
            self._dropped.discard(node)

    # --- questions ----------------------------------------------------------------------------------------------------

    def find(self, keys: Sequence[Keys], ranks: npt.NDArray[np.uint8] | None = None, locations_max: int = 3) -> Places:
        found = self._table.find(hashes_of(keys, self._seed), ranks, locations_max)
        counts, place, slots, generations, expires, numbers = found
        known = self.places()
        told = [known[number] for number in np.frombuffer(numbers, np.uint32).tolist()]
        assert all(told), "a location has a place"
        return Places([place for place in told if place], counts, place, slots, generations, expires)

    def held(self, keys: Sequence[Keys]) -> int:
        return self._table.held(hashes_of(keys, self._seed))

    def depths(self, keys: Sequence[Keys]) -> dict[str, int]:
        found = self._table.depths(hashes_of(keys, self._seed))
        return {str(self._names[number]): depth for number, depth in found}

    def holds(self, node: str, keys: Sequence[Keys]) -> npt.NDArray[np.bool_]:
        if node not in self._numbers:
            return np.zeros(count_of(keys), np.bool_)
        return np.frombuffer(self._table.holds(self._numbers[node], hashes_of(keys, self._seed)), np.bool_)

    def locate(self, keys: Sequence[bytes], exclude: str, locations_max: int) -> list[list[Location]]:
        found = self.find(keys_of(keys), None, locations_max + 1).locations()  # a node is told once of a key
        return [[where for where in places if where.node != exclude][:locations_max] for places in found]

    def holders(self, key: bytes) -> Sequence[str]:
        return list(self.depths(keys_of([key])))

    def digests(self, node: str) -> npt.NDArray[np.uint64]:
        if node not in self._numbers:
            return np.zeros(PARTS, np.uint64)
        return np.frombuffer(self._table.digests(self._numbers[node]), np.uint64)

    def check(self) -> list[str]:
        problems = self._table.check()
        for node, number in self._numbers.items():
            if self._names[number] != node:
                problems.append(f"{node} has the number of {self._names[number]}")
            if node not in self._dropped and self._table.about(number)[1] == 0:
                problems.append(f"{node} is kept without places")
        if len(self._numbers) + len(self._free) != len(self._names):
            problems.append(f"of {len(self._names)} numbers {len(self._free)} are free, {len(self._numbers)} are given")
        return problems
