"""Who holds how much of a prompt: each shard of the directory is asked for its keys, and their answers are put together.

    keys ── thin ── split ──> a part for each shard ── AskDepths / Depths ──> held_by ── merge ── widen ──> node -> Held

A node holds a prompt up to its first block that some shard does not know of it. A shard that does not answer is left out:
blocks of a chain are held together nearly always, and nothing but a request's speed depends on the answer.

Pure. Threads: none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from kvshare.places import DISK
from kvshare.runs import COLUMN_PLACE, Keys, Places, count_of

SAMPLE_KEYS = 8  # of a chain: enough to tell about how much of it lies on disk
SAMPLE_LOCATIONS_MAX = 255

I64 = npt.NDArray[np.int64]


class Held(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """How many leading blocks of a prompt a node holds, and about how many of these on its disk."""

    blocks: int
    on_disk: int = 0


class Part(NamedTuple):
    """The keys of one shard, and their places in the chain: int64, ascending."""

    keys: list[Keys]
    positions: I64


class Holders(Protocol):
    """What is needed of a `kvshare.index.Index`."""

    def depths(self, keys: Sequence[Keys]) -> dict[str, int]: ...

    def find(self, keys: Sequence[Keys], ranks: npt.NDArray[np.uint8] | None = None, locations_max: int = 3) -> Places: ...


def held_by(index: Holders, keys: Sequence[Keys], kind_of: Callable[[str, int], str]) -> dict[str, Held]:
    """What a directory's shard knows about keys of one chain, by node. ``kind_of``: the kind of a node's region.

    Depths are exact; what lies on disk is estimated from a few keys.
    """
    depths = index.depths(keys) if keys else {}
    if not depths:
        return {}
    deepest = max(depths.values())
    sampled = np.unique(np.linspace(0, deepest - 1, min(SAMPLE_KEYS, deepest)).astype(np.int64))
    found = index.find(take(keys, sampled), None, SAMPLE_LOCATIONS_MAX)
    disks = np.array([kind_of(place.node, place.region) == DISK for place in found.places], bool)
    if not disks.any():
        return {node: Held(depth) for node, depth in depths.items()}
    on_disk: Counter[str] = Counter()
    numbers, start = np.frombuffer(found.place, COLUMN_PLACE), 0
    for position, count in zip(sampled.tolist(), found.counts, strict=True):
        for number in numbers[start : start + count].tolist():
            node = found.places[number].node
            on_disk[node] += bool(disks[number]) and position < depths.get(node, 0)
        start += count
    return {
        node: Held(depth, round(depth * on_disk[node] / int(np.searchsorted(sampled, depth)))) for node, depth in depths.items()
    }


def take(keys: Sequence[Keys], positions: I64) -> list[Keys]:
    """The keys at these places (ascending) among all of ``keys``."""
    taken, start = [], 0
    for packed in keys:
        count = len(packed)
        wanted = positions[np.searchsorted(positions, start) : np.searchsorted(positions, start + count)] - start
        if len(wanted):
            hashes = np.frombuffer(packed.hashes, np.uint8).reshape(count, packed.hash_bytes)
            taken.append(Keys(packed.prefix, packed.hash_bytes, hashes[wanted].tobytes()))
        start += count
    return taken


def split(keys: Sequence[Keys], belongs: npt.NDArray[np.uint8], shards: int) -> list[Part]:
    """The part of each shard. belongs: which shard each key is of (`kvshare.fingerprints.shard_of`): uint8 [n]."""
    if shards == 1:
        return [Part(list(keys), np.arange(len(belongs)))]
    parts = []
    for shard in range(shards):
        positions = np.flatnonzero(belongs == shard)
        parts.append(Part(take(keys, positions), positions))
    return parts


def thin(keys: Sequence[Keys], count: int) -> Part:
    """At most ``count`` of these keys, evenly spread, the first and the last among them."""
    total = count_of(keys)
    if total <= count:
        return Part(list(keys), np.arange(total))
    positions = np.linspace(0, total - 1, count).astype(np.int64)
    return Part(take(keys, positions), positions)


def widen(held: Mapping[str, Held], positions: I64) -> dict[str, Held]:
    """What is held of a chain, by what is held of some of its keys, up to the last of them that is. positions: of these."""
    depths = {node: int(positions[each.blocks - 1]) + 1 for node, each in held.items()}
    return {node: Held(depths[node], round(depths[node] * each.on_disk / each.blocks)) for node, each in held.items()}


def merge(parts: Sequence[Part], answers: Sequence[Mapping[str, Held] | None], count: int) -> dict[str, Held] | None:
    """What each node holds of a chain of ``count`` keys. answers: of each shard, None where it gave none. None when nobody
    answered."""
    told = [(part, answer) for part, answer in zip(parts, answers, strict=True) if answer is not None and len(part.positions)]
    if not told:
        return None if any(len(part.positions) for part in parts) else {}
    merged = {}
    for node in set().union(*(answer for _, answer in told)):
        depth, on_disk = count, 0
        for part, answer in told:
            held = answer.get(node, NOTHING)
            if held.blocks < len(part.positions):
                depth = min(depth, int(part.positions[held.blocks]))
            on_disk += held.on_disk
        if depth:
            merged[node] = Held(depth, min(depth, on_disk))
    return merged


NOTHING = Held(0)
