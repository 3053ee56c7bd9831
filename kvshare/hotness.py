"""What is hot: chains that engines look up, in a tree of runs with decayed counts, and the ranking of their blocks.

    a-b-c-d-e ┬ f-g        a run is what several lookups have in common: all its blocks were looked up equally often.
              └ h-i-j      A lookup walks the runs of its chain, compares their hashes at once, and adds to the count of each.

Recording costs a few microseconds for each run of a chain, whatever the number of its blocks; a conversation adds a run with
each turn. A block takes 36 bytes, its hash and its depth; a run is one small object.

A block is never counted without all blocks before it, so counts do not grow along a chain: ordering by count and then by depth
names every block after the blocks that it needs, and so does every beginning of that order: it is *prefix-closed*. A shard of
the directory sees of each chain the blocks that belong to it; for those the same holds.

A count is kept as the logarithm of ``sum(2 ** (time of lookup / half-life))``: it needs no upkeep while time passes.

Pure: time is an argument. Threads: none; one caller.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Container, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvshare import keys
from kvshare.runs import Seen

NO_PARENT = b""
DEPTH = np.dtype("<u4")
NO_DEPTHS = np.empty(0, DEPTH)
TOLERANCE = 1e-6  # of logarithms, where they are compared: rounding

Depths = npt.NDArray[np.uint32]


class HotKey(NamedTuple):
    """A hot block and the block before it that is known (`NO_PARENT` for the first)."""

    key: bytes
    parent: bytes


class _Tree(NamedTuple):
    """What the keys of a tree have in common."""

    prefix: bytes
    hash_bytes: int


class _Run:
    """Blocks one behind the other, and the runs that go on where they end. A root has no blocks."""

    __slots__ = ("children", "depths", "hashes", "heat", "parent", "queued", "tree")

    def __init__(self, tree: _Tree, parent: _Run | None, hashes: bytes, depths: Depths, heat: float) -> None:
        self.tree = tree
        self.parent = parent
        self.hashes = hashes
        self.depths = depths.copy()  # a part would keep the whole in memory
        self.heat = heat  # log2 of the count, as if now were 0
        self.children: dict[bytes, _Run] = {}  # by their first hash
        self.queued = False  # is it in the queue of those that may go?

    def __len__(self) -> int:
        return len(self.depths)

    def common(self, hashes: bytes, at: int) -> int:
        """With how many blocks of this run a chain goes on at its block ``at``; with one at least."""
        step = self.tree.hash_bytes
        if hashes.startswith(self.hashes, at * step):
            return len(self)
        same, unequal = 1, min(len(self), len(hashes) // step - at) + 1
        while unequal - same > 1:
            middle = (same + unequal) // 2
            if self.hashes[same * step : middle * step] == hashes[(at + same) * step : (at + middle) * step]:
                same = middle
            else:
                unequal = middle
        return same

    def cut(self, blocks: int) -> _Run:
        """The first ``blocks`` of this run as a run of their own, before it."""
        assert self.parent is not None and 0 < blocks < len(self)
        end = blocks * self.tree.hash_bytes
        head = _Run(self.tree, self.parent, self.hashes[:end], self.depths[:blocks], self.heat)
        self.parent.children[self.first] = head
        self.parent, self.hashes, self.depths = head, self.hashes[end:], self.depths[blocks:].copy()
        head.children[self.first] = self
        return head

    @property
    def first(self) -> bytes:
        return self.hashes[: self.tree.hash_bytes]

    @property
    def last(self) -> bytes:
        return self.hashes[-self.tree.hash_bytes :]


class Hotness:
    """Counts with a half-life for at most ``keys_max`` keys; beyond it the coldest go, ends of chains first."""

    def __init__(self, half_life_seconds: float, keys_max: int) -> None:
        assert half_life_seconds > 0 and keys_max >= 1
        self._half_life_seconds = half_life_seconds
        self._keys_max = keys_max
        self._keys = 0
        self._roots: dict[bytes, dict[_Tree, _Run]] = {}  # by family
        # Ends of chains, coldest first. Heat only grows: an entry is right, or too early and put back when its turn comes.
        self._coldest: list[tuple[float, int, _Run]] = []
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return self._keys

    def knows(self, family: bytes) -> bool:
        """Has anything of this family been looked up?"""
        return family in self._roots

    def touch(self, seen: Seen, now: float, weight: float = 1.0) -> None:
        """An engine looked up this well-formed chain, or what of it belongs here; counted up to where its depths go back."""
        assert weight > 0
        tree = _Tree(seen.keys.prefix, seen.keys.hash_bytes)
        step, depths = tree.hash_bytes, _rising(seen)[: self._keys_max]
        count = len(depths)
        if not count:
            return
        hashes = seen.keys.hashes[: count * step]
        added = now / self._half_life_seconds + math.log2(weight)
        roots = self._roots.setdefault(keys.family_of(tree.prefix), {})
        run = roots.get(tree)
        if run is None:
            run = roots[tree] = _Run(tree, None, b"", NO_DEPTHS, math.inf)
        at = 0
        while at < count:
            child = run.children.get(hashes[at * step : (at + 1) * step])
            if child is None:
                self._append(run, hashes[at * step :], depths[at:], added)
                break
            same = child.common(hashes, at)
            run = child if same == len(child) else child.cut(same)
            run.heat = _sum(run.heat, added)
            at += same
        while self._keys > self._keys_max:
            self._forget(self._keys - self._keys_max)

    def hottest(self, family: bytes, keys_max: int, tenant: bytes = keys.NO_TENANT) -> list[HotKey]:
        """The ``keys_max`` hottest blocks of a family, hottest first, at equal heat head first. Prefix-closed. What is of
        ``tenant`` (a tag) comes before all others."""
        trees = self._roots.get(family, {}).items()
        lots = [[root for tree, root in trees if (keys.tenant_of(tree.prefix) == tenant) == own] for own in (True, False)]
        if tenant == keys.NO_TENANT:
            lots = [[root for _, root in trees]]
        found: list[HotKey] = []
        for roots in lots:
            found += _blocks([each for root in roots for each in _ranked(root)], keys_max - len(found))
        return found

    def hottest_of(self, wanted: Container[bytes]) -> list[bytes]:
        """All of ``wanted`` that are known, of any family, hottest first, at equal heat head first. Reads everything."""
        found: list[tuple[float, int, bytes]] = []
        for root in [root for roots in self._roots.values() for root in roots.values()]:
            for heat, run in _ranked(root):
                names = zip(run.depths.tolist(), _names(run, len(run)), strict=True)
                found += [(-heat, depth, key) for depth, key in names if key in wanted]
        return [key for _, _, key in sorted(found)]

    def check(self) -> list[str]:
        """Problems found, one sentence each; empty when all is well."""
        problems = []
        total = 0
        for family, roots in self._roots.items():
            if not roots:
                problems.append(f"family {family.hex()} is kept without keys")
            for root in roots.values():
                if not root.children:
                    problems.append(f"prefix {root.tree.prefix.hex()} is kept without keys")
                for run in _below(root):
                    total += len(run)
                    problems += _problems(run)
        if total != self._keys:
            problems.append(f"{total} keys are known, {self._keys} are counted")
        if self._keys > self._keys_max:
            problems.append(f"{self._keys} keys are known, {self._keys_max} are allowed")
        return problems

    def _append(self, run: _Run, hashes: bytes, depths: Depths, heat: float) -> None:
        if len(run) and depths[0] <= run.depths[-1]:
            return  # whoever says so is wrong about one of them
        end = _Run(run.tree, run, hashes, depths, heat)
        run.children[end.first] = end
        self._keys += len(end)
        self._queue(end)

    def _queue(self, run: _Run) -> None:
        if not run.queued:
            run.queued = True
            heapq.heappush(self._coldest, (run.heat, next(self._numbers), run))

    def _forget(self, blocks: int) -> None:
        """Up to so many blocks of the coldest end of a chain; maybe none, then the next one is colder."""
        heat, _, run = heapq.heappop(self._coldest)
        run.queued = False
        if run.children:
            return  # it is queued again when it is an end again
        if run.heat > heat:
            self._queue(run)
            return
        kept = max(0, len(run) - blocks)
        self._keys -= len(run) - kept
        if kept:
            run.hashes, run.depths = run.hashes[: kept * run.tree.hash_bytes], run.depths[:kept].copy()
            self._queue(run)
            return
        parent = run.parent
        assert parent is not None
        del parent.children[run.first]
        if parent.children:
            return
        if parent.parent is not None:
            self._queue(parent)
            return
        family = keys.family_of(run.tree.prefix)
        del self._roots[family][run.tree]
        if not self._roots[family]:
            del self._roots[family]


def _rising(seen: Seen) -> Depths:
    """The depths of a chain, up to where they no longer rise."""
    if not seen.depths:
        return np.arange(len(seen.keys), dtype=DEPTH)
    depths = np.frombuffer(seen.depths, DEPTH)
    falls = np.flatnonzero(depths[1:] <= depths[:-1])
    return depths[: int(falls[0]) + 1] if len(falls) else depths


def _sum(one: float, other: float) -> float:
    """Of two logarithms: that of the sum."""
    high, low = max(one, other), min(one, other)
    return high + math.log2(1.0 + 2.0 ** (low - high))


def _below(root: _Run) -> Iterator[_Run]:
    """All runs of a tree but its root, each after the one before it."""
    waiting = list(root.children.values())
    while waiting:
        run = waiting.pop()
        yield run
        waiting += run.children.values()


def _ranked(root: _Run) -> list[tuple[float, _Run]]:
    """All runs of a tree but its root, with their heat: rounding never lets it exceed that of the run before."""
    ranked: list[tuple[float, _Run]] = []
    waiting = [(root.heat, run) for run in root.children.values()]
    while waiting:
        most, run = waiting.pop()
        heat = min(most, run.heat)
        ranked.append((heat, run))
        waiting += [(heat, child) for child in run.children.values()]
    return ranked


def _blocks(ranked: list[tuple[float, _Run]], keys_max: int) -> list[HotKey]:
    """The hottest blocks of these runs, at equal heat the least deep first."""
    heats = np.array([heat for heat, _ in ranked])
    sizes = np.array([len(run) for _, run in ranked])
    order = np.argsort(-heats, kind="stable")
    enough = int(np.searchsorted(np.cumsum(sizes[order]), keys_max))
    if enough < len(order):
        order = order[: np.searchsorted(-heats[order], -heats[order[enough]], side="right")]  # and all that are as hot
    if not len(order) or keys_max <= 0:
        return []
    runs = [ranked[i][1] for i in order]
    owners = np.repeat(np.arange(len(runs)), sizes[order])
    depths = np.concatenate([run.depths for run in runs])
    # Within a run depths rise: whatever is taken of it is its beginning, in order.
    owners = owners[np.lexsort((depths, -heats[order][owners]))][:keys_max]
    taken = np.bincount(owners, minlength=len(runs)).tolist()
    blocks = [_hot(run, count) for run, count in zip(runs, taken, strict=True)]
    return [next(blocks[owner]) for owner in owners.tolist()]


def _hot(run: _Run, count: int) -> Iterator[HotKey]:
    """The first ``count`` blocks of a run."""
    names = _names(run, count)
    assert run.parent is not None
    before = run.tree.prefix + run.parent.last if run.parent.hashes else NO_PARENT
    return map(HotKey, names, [before, *names[:-1]])


def _names(run: _Run, count: int) -> list[bytes]:
    prefix, step = run.tree
    return [prefix + run.hashes[start : start + step] for start in range(0, count * step, step)]


def _problems(run: _Run) -> list[str]:
    problems = []
    parent, name = run.parent, run.first.hex()
    assert parent is not None
    if not len(run) or len(run.hashes) != len(run) * run.tree.hash_bytes:
        problems.append(f"the run at {name} has {len(run.hashes)} bytes of hashes and {len(run)} depths")
    if run.depths.base is not None:
        problems.append(f"the run at {name} keeps more depths in memory than its own")
    if parent.children.get(run.first) is not run:
        problems.append(f"{name} is not found from the block before it")
    if (np.diff(np.concatenate((parent.depths[-1:], run.depths)).astype(np.int64)) <= 0).any():
        problems.append(f"{name} or one behind it is no deeper than the block before it")
    if run.heat > parent.heat + TOLERANCE:
        problems.append(f"{name} is hotter than the block before it")
    if not run.children and not run.queued:
        problems.append(f"{name} is the end of a chain and can never be forgotten")
    return problems
