"""The blocks of one region: which keys it holds, which slots are free, reserved or resting, what leaves when it is full.

    free ──reserve──> reserved ──commit──> indexed ──evicted by reserve, drop──> free
     ^                  │  │                  │
     │<──────abort──────┘  │ release          │ quarantine
     └──────expire────── resting <────────────┘

A slot is in exactly one of these four. The header table of the region is the truth about what is complete, and changes with
every step here; the index and the policy are built from it.

* A reservation belongs to an owner (a session's number). When its owner dies its writer may still be writing, so the slot
  rests for ``quarantine_seconds`` before others get it. A slot whose block was found corrupt rests for the same reason.
* Nothing is pinned: whatever is indexed may be evicted, readers validate. Reserved slots are never evicted.
* A chain of blocks is of use from its head only. `commit` and `adopt` enter a batch into the policy tail first, so that of a
  chain that nobody asks for again the tail leaves first.

Threads: one caller, the node's loop; nothing here waits. Time is an argument.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from kvshare.config import Settings
from kvshare.eviction import Policy, S3Fifo
from kvshare.keys import KEY_BYTES_MAX
from kvshare.places import Stored
from kvshare.region import Region
from kvshare.slots import Recovered

NO_SLOT = (-1, 0)
_U64_MASK = (1 << 64) - 1


class Reservation(NamedTuple):
    key: bytes
    generation: int
    length: int
    owner: int


class Store:
    """See the module's docstring. ``policy``: says what leaves first; default `S3Fifo`."""

    def __init__(self, region: Region, settings: Settings, policy: Policy | None = None) -> None:
        self._region = region
        self._policy: Policy = policy if policy is not None else S3Fifo()
        self._quarantine_seconds = settings.quarantine_seconds
        self._index: dict[bytes, Stored] = {}
        self._keys: dict[int, bytes] = {}  # slot -> key, of what is indexed
        self._reserved: dict[int, Reservation] = {}
        self._being_written: set[bytes] = set()  # keys of the reservations
        self._resting: deque[tuple[float, int]] = deque()  # (time of its end, slot), in order of time
        self._removed: list[bytes] = []
        self._slots = 0
        self._free: list[int] = []  # taken from the end
        self._counts = dict.fromkeys(("stored", "evicted", "dropped", "corrupt", "present", "no_room", "ignored"), 0)
        self.extend()

    # --- questions ----------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._index)

    def lookup(self, keys: Sequence[bytes]) -> list[Stored | None]:
        """What is held under each key, None where nothing is."""
        held = self._index.get
        return [held(key) for key in keys]

    def inventory(self) -> Iterator[Stored]:
        """All blocks held at this moment, whatever changes while it is read."""
        return iter(list(self._index.values()))

    @property
    def free_slots(self) -> int:
        return len(self._free)

    @property
    def needs_growth(self) -> bool:
        """Less than a chunk is free, and the region has chunks that are not allocated."""
        return len(self._free) < self._region.chunk_slots and self._region.available_slots < self._region.slots

    def next_expiry(self) -> float | None:
        """When `expire` has something to do; None when nothing rests."""
        return self._resting[0][0] if self._resting else None

    @property
    def counters(self) -> dict[str, int]:
        """What happened since the start (stored, evicted, dropped, corrupt; of reservations: present, no_room; ignored:
        commits and the like that came too late), and what is now (blocks, bytes, free_slots, reserved_slots,
        resting_slots)."""
        return self._counts | {
            "blocks": len(self._index),
            "bytes": len(self._index) * self._region.slot_bytes,
            "free_slots": len(self._free),
            "reserved_slots": len(self._reserved),
            "resting_slots": len(self._resting),
        }

    # --- saving -------------------------------------------------------------------------------------------------------

    def reserve(self, keys: Sequence[bytes], length: int, owner: int, now: float) -> list[tuple[int, int]]:
        """A slot and its odd generation for each of ``keys``, blocks of ``length`` bytes; ``(-1, 0)`` where there is nothing to
        write: the block is here, is being written, or there is no room. Evicts what is coldest when nothing is free."""
        self.expire(now)
        possible = 0 < length <= self._region.slot_bytes
        return [self._reserve(key, length, owner) if possible and 0 < len(key) <= KEY_BYTES_MAX else NO_SLOT for key in keys]

    def commit(self, slots: Sequence[int], generations: Sequence[int], checksums: Sequence[int], owner: int) -> list[Stored]:
        """These are written. Returns those accepted, in order; what is not reserved by ``owner`` under that generation (any
        more) is ignored: its session may have been given up meanwhile."""
        accepted = []
        for slot, generation, checksum in zip(slots, generations, checksums, strict=False):
            reservation = self._take(slot, generation, owner)
            if reservation is not None:
                accepted.append(self._finish(slot, reservation, checksum & _U64_MASK))
        self._counts["stored"] += len(accepted)
        for block in reversed(accepted):
            self._policy.insert(block.key)
        return accepted

    def abort(self, slots: Sequence[int], generations: Sequence[int], owner: int) -> None:
        """These will not be written, and nobody is writing them: free at once. Ignores what `commit` would ignore."""
        for slot, generation in zip(slots, generations, strict=False):
            if self._take(slot, generation, owner) is not None:
                self._release_slot(slot)

    def release(self, owner: int, now: float) -> None:
        """An owner is gone, maybe while writing: what it reserved rests."""
        for slot in [slot for slot, reservation in self._reserved.items() if reservation.owner == owner]:
            self._being_written.discard(self._reserved.pop(slot).key)
            self._rest(slot, now)

    def expire(self, now: float) -> None:
        """Slots that have rested long enough are free again."""
        while self._resting and self._resting[0][0] <= now:
            self._release_slot(self._resting.popleft()[1])

    # --- use ----------------------------------------------------------------------------------------------------------

    def touch(self, keys: Sequence[bytes]) -> None:
        """These were asked for and found; unknown ones are ignored."""
        for key in keys:
            self._policy.touch(key)

    def quarantine(self, slots: Sequence[int], generations: Sequence[int], now: float) -> None:
        """These blocks failed their checksum where they lie: out of the index, the slots rest. Ignores what has gone."""
        for slot, generation in zip(slots, generations, strict=False):
            key = self._keys.get(slot)
            if key is None or self._index[key].generation != generation:
                self._counts["ignored"] += 1
                continue
            self._policy.remove(key)
            self._forget(key)
            self._region.retire(slot)
            self._rest(slot, now)
            self._counts["corrupt"] += 1

    def drop(self, keys: Sequence[bytes]) -> None:
        """Give these up; unknown ones are ignored."""
        for key in keys:
            if key in self._index:
                self._policy.remove(key)
                self._release_slot(self._forget(key).slot)
                self._counts["dropped"] += 1

    def take_removed(self) -> list[bytes]:
        """Keys that left the index since the last call, oldest first. Tell of them before telling of what came: a slot, and a
        key too, may be among both."""
        removed, self._removed = self._removed, []
        return removed

    # --- slots --------------------------------------------------------------------------------------------------------

    def extend(self) -> None:
        """The region has grown: its new slots are free. Lowest first, so that a batch lies together."""
        available = self._region.available_slots
        self._free[:0] = range(available - 1, self._slots - 1, -1)
        self._slots = available

    def adopt(self, recovered: Sequence[Recovered], unsettled: Sequence[int] = (), now: float = 0.0) -> list[Stored]:
        """Enter what an arena found at its start, before anything is reserved; returns it. ``unsettled`` slots rest first."""
        assert not self._index and not self._reserved
        adopted = []
        for slot, key, length, generation in recovered:
            if key in self._index:
                self._region.retire(slot)  # a second copy, of no use
                continue
            self._index[key] = Stored(key, self._region.region, slot, generation, length)
            self._keys[slot] = key
            adopted.append(self._index[key])
        for block in reversed(adopted):
            self._policy.insert(block.key)
        resting = set(unsettled) - self._keys.keys()
        self._free = [slot for slot in self._free if slot not in self._keys and slot not in resting]
        for slot in sorted(resting):
            self._rest(slot, now)
        return adopted

    def check(self) -> list[str]:
        """Problems found here, in the policy and in the region's headers, one sentence each; empty when all is well."""
        homes = [*self._free, *self._reserved, *self._keys, *(slot for _, slot in self._resting)]
        problems = [*self._region.check(), *self._policy.check()]
        if sorted(homes) != list(range(self._slots)):
            problems.append(f"{len(homes)} places for {self._slots} slots, {len(set(homes))} different ones")
        if {key: self._index[key].slot for key in self._index} != {key: slot for slot, key in self._keys.items()}:
            problems.append("keys by slot and slots by key differ")
        if len(self._policy) != len(self._index) or any(key not in self._policy for key in self._index):
            problems.append(f"the policy orders {len(self._policy)} keys, the index has {len(self._index)}")
        if self._being_written != {reservation.key for reservation in self._reserved.values()}:
            problems.append("keys being written are not those of the reservations")
        problems += [f"key {key.hex()} is both held and being written" for key in self._being_written & self._index.keys()]
        return problems + self._check_headers()

    def _check_headers(self) -> list[str]:
        expected = np.zeros(self._slots, np.uint64)
        for slot, reservation in self._reserved.items():
            expected[slot] = reservation.generation
        for block in self._index.values():
            expected[block.slot] = block.generation
        found = self._region.generations(np.arange(self._slots))
        held = expected != 0
        wrong = np.flatnonzero(np.where(held, found != expected, (found != 0) & (found % 2 == 0))).tolist()
        problems = [f"slot {slot} has generation {found[slot]}, expected {expected[slot] or 'an odd one'}" for slot in wrong]
        for block in self._index.values():
            if self._region.key(block.slot) != block.key:
                problems.append(f"slot {block.slot} has another key in its header than in the index")
        return problems

    def _reserve(self, key: bytes, length: int, owner: int) -> tuple[int, int]:
        if key in self._index or key in self._being_written:
            self._counts["present"] += 1
            return NO_SLOT
        slot = self._free.pop() if self._free else self._evict()
        if slot is None:
            self._counts["no_room"] += 1
            return NO_SLOT
        generation = self._region.begin(slot)
        self._reserved[slot] = Reservation(key, generation, length, owner)
        self._being_written.add(key)
        return slot, generation

    def _evict(self) -> int | None:
        key = self._policy.evict()
        if key is None:
            return None
        self._counts["evicted"] += 1
        # Not retired here: whoever asks for the slot begins to write it, which is one increment as well.
        return self._forget(key).slot

    def _finish(self, slot: int, reservation: Reservation, checksum: int) -> Stored:
        key, generation, length, _ = reservation
        generation = self._region.finish(slot, generation, key, length, checksum)
        block = Stored(key, self._region.region, slot, generation, length)
        self._index[key] = block
        self._keys[slot] = key
        return block

    def _take(self, slot: int, generation: int, owner: int) -> Reservation | None:
        """End a reservation; None, and counted, when it is not (any more) the owner's."""
        reservation = self._reserved.get(slot)
        if reservation is None or (reservation.generation, reservation.owner) != (generation, owner):
            self._counts["ignored"] += 1
            return None
        del self._reserved[slot]
        self._being_written.discard(reservation.key)
        return reservation

    def _forget(self, key: bytes) -> Stored:
        block = self._index.pop(key)
        del self._keys[block.slot]
        self._removed.append(key)
        return block

    def _rest(self, slot: int, now: float) -> None:
        self._resting.append((now + self._quarantine_seconds, slot))

    def _release_slot(self, slot: int) -> None:
        # Also for a slot that was reserved: a commit that comes yet finds another generation.
        self._region.retire(slot)
        self._free.append(slot)
