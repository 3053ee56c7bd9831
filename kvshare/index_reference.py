"""The directory's index as dicts: slow, plain, the oracle that `kvshare.index.CompactIndex` is compared with.

    holders   key -> node -> Stored, freshest last      held   node -> key -> the same Stored

Threads: none; one caller.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

import numpy as np
import numpy.typing as npt

from kvshare.fingerprints import ALL_PARTS, digests_of, hashes_of, part_of
from kvshare.index import LOCATIONS_PER_KEY, RANK_NEVER, SLOTS_MAX
from kvshare.places import Location, Stored, located
from kvshare.runs import Keys, Place, Places, Run, keys_of, places_of, runs_of


class ReferenceIndex:
    """An `Index` of at most ``keys_max`` keys and twice as many locations."""

    def __init__(self, keys_max: int, seed: int = 0) -> None:
        assert keys_max >= 1
        self._keys_max = keys_max
        self._locations_max = keys_max * LOCATIONS_PER_KEY
        self._seed = seed
        self._holders: dict[bytes, dict[str, Stored]] = {}
        self._held: dict[str, dict[bytes, Stored]] = {}
        self._locations = 0
        self._places: list[Place] = []
        self._numbers: dict[Place, int] = {}

    def __len__(self) -> int:
        return len(self._holders)

    def nodes(self) -> Set[str]:
        return self._held.keys()

    def locations(self) -> int:
        return self._locations

    def places(self) -> Sequence[Place | None]:
        return self._places

    def add(self, node: str, runs: Sequence[Run]) -> int:
        return sum(not self._add(node, block) for run in runs for block in run.stored())

    def _add(self, node: str, block: Stored) -> bool:
        holders = self._holders.get(block.key, {})
        new = node not in holders
        full = self._locations >= self._locations_max or (not holders and len(self._holders) >= self._keys_max)
        if block.slot >= SLOTS_MAX or (new and full):
            return False
        holders.pop(node, None)
        holders[node] = block
        self._holders[block.key] = holders
        self._held.setdefault(node, {})[block.key] = block
        self._locations += new
        self._number(Place(node, block.region, block.length))
        return True

    def _number(self, place: Place) -> int:
        if place not in self._numbers:
            self._numbers[place] = len(self._places)
            self._places = [*self._places, place]  # nothing is ever taken out
        return self._numbers[place]

    def remove(self, node: str, keys: Sequence[Keys]) -> None:
        self._remove(node, [key for packed in keys for key in packed])

    def _remove(self, node: str, keys: Sequence[bytes]) -> None:
        held = self._held.get(node, {})
        for key in keys:
            if held.pop(key, None) is None:
                continue
            self._locations -= 1
            holders = self._holders[key]
            del holders[node]
            if not holders:
                del self._holders[key]
        if not held:
            self._held.pop(node, None)

    def drop(self, node: str, parts: int = ALL_PARTS) -> None:
        held = list(self._held.get(node, {}))
        of_keys = part_of(hashes_of(keys_of(held), self._seed)).tolist()
        self._remove(node, [key for key, part in zip(held, of_keys, strict=True) if parts >> part & 1])

    def sweep(self) -> bool:
        """`drop` has left nothing over."""
        return False

    def find(self, keys: Sequence[Keys], ranks: npt.NDArray[np.uint8] | None = None, locations_max: int = 3) -> Places:
        def rank_of(where: Location) -> int:
            return 0 if ranks is None else int(ranks[self._numbers[Place(where.node, where.region, where.length)]])

        found = []
        for key in (key for packed in keys for key in packed):
            told = [where for where in self._freshest(key) if rank_of(where) != RANK_NEVER]
            found.append(sorted(told, key=rank_of)[:locations_max])  # a stable sort: the freshest stay first among equals
        return places_of(found)

    def _freshest(self, key: bytes) -> list[Location]:
        return [located(node, block) for node, block in reversed(self._holders.get(key, {}).items())]

    def held(self, keys: Sequence[Keys]) -> int:
        count = 0
        for key in (key for packed in keys for key in packed):
            if key not in self._holders:
                break
            count += 1
        return count

    def depths(self, keys: Sequence[Keys]) -> dict[str, int]:
        whole = [key for packed in keys for key in packed]
        found = {}
        for node in self.holders(whole[0]) if whole else ():
            held = self._held[node]
            found[node] = next((depth for depth, key in enumerate(whole) if key not in held), len(whole))
        return found

    def holds(self, node: str, keys: Sequence[Keys]) -> npt.NDArray[np.bool_]:
        held = self._held.get(node, {})
        return np.array([key in held for packed in keys for key in packed], np.bool_)

    def locate(self, keys: Sequence[bytes], exclude: str, locations_max: int) -> list[list[Location]]:
        return [[where for where in self._freshest(key) if where.node != exclude][:locations_max] for key in keys]

    def holders(self, key: bytes) -> Sequence[str]:
        return list(reversed(self._holders.get(key, {})))

    def digests(self, node: str) -> npt.NDArray[np.uint64]:
        return digests_of(runs_of(self._held.get(node, {}).values()), self._seed)

    def check(self) -> list[str]:
        problems = []
        for key, holders in self._holders.items():
            if not holders:
                problems.append(f"{key.hex()} is kept without a holder")
            problems.extend(f"{key.hex()} is not held by {node}" for node in holders if key not in self._held.get(node, {}))
        for node, held in self._held.items():
            if not held:
                problems.append(f"{node} is kept without keys")
            for key, block in held.items():
                if block.key != key or self._holders.get(key, {}).get(node) is not block:
                    problems.append(f"{key.hex()} of {node} cannot be found")
        if self._locations != sum(map(len, self._held.values())):
            problems.append(f"{self._locations} locations are counted, {sum(map(len, self._held.values()))} are known")
        if len(self._holders) > self._keys_max or self._locations > self._locations_max:
            problems.append(f"{len(self._holders)} keys and {self._locations} locations are over the limit")
        return problems
