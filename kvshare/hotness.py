"""What is hot: decayed counts of the blocks that engines look up, and their ranking within a family.

A chain is reported from its head, so a block is never counted without all blocks before it: counts do not grow along a chain.
Ordering by count and then by depth therefore names every block after the blocks that it needs, and so does every beginning
of that order: it is *prefix-closed*.

Decay runs forward: a lookup adds ``2 ** ((now - landmark) / half_life)`` instead of every count being halved again and again.
Counts keep their order while time passes, a touch costs the same whatever is known, and only the far landmark is moved now
and then, by a power of two, which loses nothing.

Pure: time is an argument. Threads: none; one caller.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import NamedTuple

import numpy as np

from kvshare import keys

NO_PARENT = b""
EXPONENT_MAX = 256.0  # half-lives before the landmark moves; doubles end at 1023
KEEP_SHARE = 7 / 8  # what stays when there are too many: room for so many new keys before the next sorting


class HotKey(NamedTuple):
    """A hot block and the block before it in its chain (`NO_PARENT` for a head)."""

    key: bytes
    parent: bytes


class _Heat:
    __slots__ = ("count", "depth", "parent")

    def __init__(self, depth: int, parent: bytes) -> None:
        self.count = 0.0  # in units of the landmark
        self.depth = depth
        self.parent = parent


class Hotness:
    """Counts with a half-life for at most ``keys_max`` keys; beyond it the coldest go, ends of chains first."""

    def __init__(self, half_life_seconds: float, keys_max: int) -> None:
        assert half_life_seconds > 0 and keys_max >= 1
        self._half_life_seconds = half_life_seconds
        self._keys_max = keys_max
        self._landmark: float | None = None
        self._families: dict[bytes, dict[bytes, _Heat]] = {}
        self._keys = 0

    def __len__(self) -> int:
        return self._keys

    def touch(self, chain: Sequence[bytes], now: float, weight: float = 1.0) -> None:
        """An engine looked up this chain, from its head. Costs O(1) for each key, amortised.

        A chain that contradicts what is known (a block with another predecessor, another prefix) is counted up to there.
        """
        if not chain:
            return
        added = weight * self._scale(now)
        prefix = keys.prefix_of(chain[0])
        family = self._families.setdefault(keys.family_of(prefix), {})
        before = len(family)
        parent = NO_PARENT
        for depth, key in enumerate(chain[: self._keys_max]):
            heat = family.get(key)
            if heat is None:
                if not key.startswith(prefix):
                    break
                heat = family[key] = _Heat(depth, parent)
            elif heat.parent != parent:
                break
            heat.count += added
            parent = key
        self._keys += len(family) - before
        if not family:
            del self._families[keys.family_of(prefix)]
        if self._keys > self._keys_max:
            self._shrink()

    def count(self, key: bytes, now: float) -> float:
        """The decayed number of lookups of ``key``: one that was looked up a half-life ago counts a half."""
        heat = self._families.get(keys.family_of(key), {}).get(key)
        if heat is None or self._landmark is None:
            return 0.0
        return float(heat.count * 2.0 ** ((self._landmark - now) / self._half_life_seconds))

    def hottest(self, family: bytes, keys_max: int) -> list[HotKey]:
        """The ``keys_max`` hottest blocks of a family, hottest first, at equal heat head first. Prefix-closed.

        The order does not depend on the time at which it is asked for: all counts decay alike.
        """
        heats = self._families.get(family, {})
        names = list(heats)
        order = _hottest_first(list(heats.values()))[:keys_max]
        return [HotKey(names[i], heats[names[i]].parent) for i in order]

    def hottest_of(self, wanted: Container[bytes]) -> list[bytes]:
        """All of ``wanted`` that have ever been looked up, of any family, hottest first, at equal heat head first."""
        found = [(key, heat) for heats in self._families.values() for key, heat in heats.items() if key in wanted]
        return [found[i][0] for i in _hottest_first([heat for _, heat in found])]

    def check(self) -> list[str]:
        """Problems found, one sentence each; empty when all is well."""
        problems = []
        total = 0
        for family, heats in self._families.items():
            total += len(heats)
            if not heats:
                problems.append(f"family {family.hex()} is kept without keys")
            for key, heat in heats.items():
                if heat.parent == NO_PARENT:
                    continue
                parent = heats.get(heat.parent)
                if parent is None:
                    problems.append(f"{key.hex()} is known without the block before it")
                elif parent.count < heat.count or parent.depth != heat.depth - 1:
                    problems.append(f"{key.hex()} ranks before the block before it")
        if total != self._keys:
            problems.append(f"{total} keys are known, {self._keys} are counted")
        if self._keys > self._keys_max:
            problems.append(f"{self._keys} keys are known, {self._keys_max} are allowed")
        return problems

    def _scale(self, now: float) -> float:
        """What one lookup at ``now`` is worth in units of the landmark."""
        if self._landmark is None:
            self._landmark = now
        exponent = (now - self._landmark) / self._half_life_seconds
        if exponent > EXPONENT_MAX:
            halvings = int(exponent)
            # The oldest counts may become zero: they are the coldest still, and stay in order.
            factor = 2.0 ** -min(halvings, 1074)
            for heats in self._families.values():
                for heat in heats.values():
                    heat.count *= factor
            self._landmark += halvings * self._half_life_seconds
            exponent -= halvings
        return float(2.0**exponent)

    def _shrink(self) -> None:
        """Forget the coldest of all families. A block never outlives one before it: it is no hotter, and deeper."""
        owners = [(family, key) for family, heats in self._families.items() for key in heats]
        order = _hottest_first([self._families[family][key] for family, key in owners])
        kept = max(1, int(self._keys_max * KEEP_SHARE))
        for i in order[kept:]:
            family, key = owners[i]
            del self._families[family][key]
            if not self._families[family]:
                del self._families[family]
        self._keys = kept


def _hottest_first(heats: list[_Heat]) -> list[int]:
    counts = np.fromiter((heat.count for heat in heats), np.float64, len(heats))
    depths = np.fromiter((heat.depth for heat in heats), np.int64, len(heats))
    order: list[int] = np.lexsort((depths, -counts)).tolist()
    return order
