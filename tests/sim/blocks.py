"""The memory of a node in a simulated cluster: the real `kvshare.store.Store` over a small real header table and real bytes.

    truth(key) ──written half by half──> slot ──read half by half──> compared with truth(key)

What a block holds is a function of its key, so whoever reads one knows whether it is right. Reading and writing take virtual
time, and in their middle others act: a reader may see two halves of different blocks, and only generations tell it.

The memory outlives its node, as files of an arena do: the next start recovers it by `kvshare.slots.Arena`'s own scan.

Threads: none.
"""

from __future__ import annotations

import ctypes
import hashlib
from functools import lru_cache

import xxhash

from kvshare.config import Settings
from kvshare.keys import seed_of
from kvshare.mapping import Mapping
from kvshare.places import Stored
from kvshare.region import SUPERBLOCK, Region, superblock, table_bytes
from kvshare.slots import Arena, Recovered
from kvshare.store import Store

SLOT_BYTES = 64
HALF = SLOT_BYTES // 2


@lru_cache(1 << 16)
def truth(key: bytes) -> bytes:
    """What the block of this key holds."""
    return hashlib.blake2b(key, digest_size=SLOT_BYTES).digest()


def halves(key: bytes) -> tuple[bytes, bytes]:
    return truth(key)[:HALF], truth(key)[HALF:]


@lru_cache(1 << 16)
def checksum(key: bytes) -> int:
    return xxhash.xxh3_64_intdigest(truth(key), seed_of(key))


class _Arena(Region):
    """One owner's arena: the memory of those before it, above all of their generations."""

    recover_blocks = Arena.recover_blocks
    _holds = Arena._holds

    def __init__(self, data: Mapping, table: Mapping, birth: int) -> None:
        super().__init__(data, table, birth=birth)
        self._superblock["birth"] = birth
        self.recovered: list[Recovered] = []
        self.unsettled: list[int] = []


class Memory:
    """Slots that outlive their owners. ``slots``: how many."""

    def __init__(self, slots: int) -> None:
        self._data, self._table = Mapping.anonymous(slots * SLOT_BYTES), Mapping.anonymous(table_bytes(slots))
        head = superblock(SLOT_BYTES, slots, slots * SLOT_BYTES, 0, 0)
        head["available_slots"], head["owner_pid"] = slots, 0
        self._table.memory[: SUPERBLOCK.itemsize] = head.tobytes()
        self.slots = slots

    def own(self, birth: int, settings: Settings, now: float) -> Shelf:
        """A new owner, whose generations are above ``birth``, recovers what is whole."""
        region = _Arena(self._data, self._table, birth)
        region.recover_blocks()  # type: ignore[misc]
        store = Store(region, settings)
        store.adopt(region.recovered, region.unsettled, now)
        return Shelf(region, store)


class Shelf:
    """A region, its store, and the bytes."""

    def __init__(self, region: Region, store: Store) -> None:
        self.region = region
        self.store = store

    def write(self, slot: int, half: int, content: bytes) -> None:
        """Half of a block into a slot, whoever it belongs to by now."""
        ctypes.memmove(self.region.slot_address(slot) + half * HALF, content, HALF)

    def read(self, slot: int, half: int) -> bytes:
        return ctypes.string_at(self.region.slot_address(slot) + half * HALF, HALF)

    def generation(self, slot: int) -> int:
        return int(self.region.generations([slot])[0])

    def check(self) -> list[str]:
        """Of everything that is said to be complete: is it what its key says?"""
        problems = self.store.check()
        return problems + [
            f"slot {block.slot} does not hold its key's block" for block in self.held() if not self._is_true(block)
        ]

    def held(self) -> list[Stored]:
        return list(self.store.inventory())

    def _is_true(self, block: Stored) -> bool:
        return self.read(block.slot, 0) + self.read(block.slot, 1) == truth(block.key)
