"""Many keys, many blocks, few objects: how messages and the index carry them.

    Keys   a prefix and the block hashes that follow it         Run      blocks that a node holds: keys, slots, generations
    Seen   a chain that was looked up                           Places   the answer to "where are these keys?"

Columns are little-endian bytes, so that a message of thousands of blocks decodes to a handful of objects, and compiled loops
read it as it came. Order is kept: the flattened keys of a list of `Keys` are the keys that it was made of.

Pure. Threads: none; frozen values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, pairwise

import msgspec
import numpy as np

from kvshare.keys import KEY_BYTES_MAX, PREFIX_BYTES
from kvshare.places import Location, Stored

HASH_BYTES_MAX = KEY_BYTES_MAX - PREFIX_BYTES
COLUMN_SLOT, COLUMN_GENERATION, COLUMN_PLACE = np.dtype("<u4"), np.dtype("<u8"), np.dtype("<u2")


class Keys(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """Keys that share a prefix and the length of their hashes: ``hashes`` is their hashes, one behind the other."""

    prefix: bytes
    hash_bytes: int
    hashes: bytes

    def __len__(self) -> int:
        return len(self.hashes) // self.hash_bytes if self.hash_bytes > 0 else 0

    def __iter__(self) -> Iterator[bytes]:
        step = self.hash_bytes
        return (self.prefix + self.hashes[start : start + step] for start in range(0, len(self.hashes), step))

    def well_formed(self) -> bool:
        return (
            len(self.prefix) == PREFIX_BYTES
            and 0 < self.hash_bytes <= HASH_BYTES_MAX
            and len(self.hashes) % self.hash_bytes == 0
        )


class Run(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """Blocks that lie in one region of their node, have one length and end together: `kvshare.places.Stored`, in columns."""

    keys: Keys
    region: int
    length: int
    expires: int
    slots: bytes  # uint32 each
    generations: bytes  # uint64 each

    def __len__(self) -> int:
        return len(self.keys)

    def stored(self) -> Iterator[Stored]:
        slots = np.frombuffer(self.slots, COLUMN_SLOT).tolist()
        generations = np.frombuffer(self.generations, COLUMN_GENERATION).tolist()
        for key, slot, generation in zip(self.keys, slots, generations, strict=True):
            yield Stored(key, self.region, slot, generation, self.length, self.expires)

    def well_formed(self) -> bool:
        """Complete blocks only: an odd generation is one that is being written."""
        if not (self.keys.well_formed() and self.region >= 0 and self.length > 0 and 0 <= self.expires < 1 << 32):
            return False
        if (len(self.slots), len(self.generations)) != (4 * len(self), 8 * len(self)):
            return False
        return not bool((np.frombuffer(self.generations, COLUMN_GENERATION) & 1).any())


class Seen(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """A chain that an engine looked up, or what of it belongs to one shard of the directory.

    keys: in order of the chain. depths: uint32 each, the place of each in its chain, from 0; empty where the keys are a whole
    chain from its head.
    """

    keys: Keys
    depths: bytes = b""

    def well_formed(self) -> bool:
        return self.keys.well_formed() and len(self.depths) in (0, 4 * len(self.keys))


class Place(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What locations have in common."""

    node: str
    region: int
    length: int


class Places(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """For each key, in order, where it is: `kvshare.places.Location`, in columns, best first.

    counts: uint8, one for each key. The others have one entry for each location: place (uint16, an index of ``places``), slots
    (uint32), generations (uint64), expires (uint32; empty where nothing ends).
    """

    places: list[Place]
    counts: bytes
    place: bytes
    slots: bytes
    generations: bytes
    expires: bytes = b""

    def __len__(self) -> int:
        """Keys, not locations."""
        return len(self.counts)

    def locations(self) -> list[list[Location]]:
        places = self.places
        slots = np.frombuffer(self.slots, COLUMN_SLOT).tolist()
        generations = np.frombuffer(self.generations, COLUMN_GENERATION).tolist()
        ends = np.frombuffer(self.expires, COLUMN_SLOT).tolist() if self.expires else [0] * len(slots)
        numbers = np.frombuffer(self.place, COLUMN_PLACE).tolist()
        found = [
            Location(places[number].node, places[number].region, slot, generation, places[number].length, end)
            for number, slot, generation, end in zip(numbers, slots, generations, ends, strict=True)
        ]
        answer, start = [], 0
        for count in self.counts:
            answer.append(found[start : start + count])
            start += count
        return answer


_Lot = tuple[int, int, int, bytes, int]  # what blocks of a run have in common

NOWHERE = Places([], b"", b"", b"", b"")


def keys_of(keys: Iterable[bytes]) -> list[Keys]:
    """Whole keys, packed; order is kept. Keys that are one prompt's cost no loop here."""
    packed = []
    for size, group in groupby(keys, key=len):
        if size <= PREFIX_BYTES:
            packed += [Keys(key, 0, b"") for key in group]  # no keys, as `Keys.well_formed` says
            continue
        table = np.frombuffer(b"".join(group), np.uint8).reshape(-1, size)
        prefixes, turns = table[:, :PREFIX_BYTES], []
        if not (prefixes == prefixes[0]).all():
            turns = (np.flatnonzero((prefixes[1:] != prefixes[:-1]).any(axis=1)) + 1).tolist()
        hashes = table.view([("", f"V{PREFIX_BYTES}"), ("hash", f"V{size - PREFIX_BYTES}")])["hash"]
        for start, end in pairwise([0, *turns, len(table)]):
            packed.append(Keys(prefixes[start].tobytes(), size - PREFIX_BYTES, hashes[start:end].tobytes()))
    return packed


def count_of(packed: Sequence[Keys] | Sequence[Run]) -> int:
    return sum(map(len, packed))


def runs_of(stored: Iterable[Stored]) -> list[Run]:
    """Blocks, packed; order is kept."""
    return [_run(lot, list(group)) for lot, group in groupby(stored, key=_lot)]


def gathered(stored: Iterable[Stored]) -> list[Run]:
    """Blocks, packed, those that are alike together: in each run they are in the order in which they came."""
    lots: dict[_Lot, list[Stored]] = {}
    for block in stored:
        lots.setdefault(_lot(block), []).append(block)
    return [_run(lot, blocks) for lot, blocks in lots.items()]


def places_of(found: Iterable[Sequence[Location]]) -> Places:
    """Locations of keys, packed; order is kept."""
    counts = bytes(map(len, found := list(found)))
    flat = [where for locations in found for where in locations]
    numbers: dict[tuple[str, int, int], int] = {}
    place = [numbers.setdefault((where.node, where.region, where.length), len(numbers)) for where in flat]
    return Places(
        [Place(*common) for common in numbers],
        counts,
        np.array(place, COLUMN_PLACE).tobytes(),
        np.array([where.slot for where in flat], COLUMN_SLOT).tobytes(),
        np.array([where.generation for where in flat], COLUMN_GENERATION).tobytes(),
        np.array([where.expires for where in flat], COLUMN_SLOT).tobytes() if any(where.expires for where in flat) else b"",
    )


def _lot(block: Stored) -> _Lot:
    key = block.key
    return block.region, block.length, block.expires, key[:PREFIX_BYTES], len(key) - PREFIX_BYTES


def _run(lot: _Lot, blocks: Sequence[Stored]) -> Run:
    region, length, expires, prefix, size = lot
    return Run(
        Keys(prefix, size, b"".join([block.key[PREFIX_BYTES:] for block in blocks])),
        region,
        length,
        expires,
        np.array([block.slot for block in blocks], COLUMN_SLOT).tobytes(),
        np.array([block.generation for block in blocks], COLUMN_GENERATION).tobytes(),
    )
