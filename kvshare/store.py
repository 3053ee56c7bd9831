"""The blocks of one region: which keys it holds, which slots are free, reserved or resting, what leaves when it is full.

    free ──reserve──> reserved ──commit──> indexed ──evicted by reserve, drop──> free
     ^                  │  │                  │    │
     │<──────abort──────┘  │ release          │    └──purge──> soiled
     ├──────expire────── resting <────────────┘ quarantine      │
     └──────cleaned (zeros) <───────────────────────────────────┘

A slot is in exactly one of these five. The header table of the region is the truth about what is complete, and changes with
every step here; the index and the policy are built from it.

* A reservation belongs to an owner (a session's number). When its owner dies its writer may still be writing, so the slot
  rests for ``quarantine_seconds`` before others get it. A slot whose block was found corrupt rests for the same reason.
* Nothing is pinned: whatever is indexed may be evicted, readers validate. Reserved slots are never evicted.
* A purge leaves no byte of what it was about: slots that may hold some are soiled until they are cleaned: those of the blocks,
  of reservations, and free ones that were ever written. Who purges cleans (`kvshare.purging`).
* A chain of blocks is of use from its head only. `commit` and `adopt` enter a batch into policy and quota tail first, so
  that of a chain that nobody asks for again the tail leaves first.

Threads: one caller, the node's loop; nothing here waits. Time is an argument.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import NamedTuple

import numpy as np

from kvshare.config import Settings
from kvshare.eviction import Policy, S3Fifo
from kvshare.gate import Gate
from kvshare.keys import KEY_BYTES_MAX
from kvshare.places import Stored
from kvshare.purge import Matches
from kvshare.quota import Expiries, Quota
from kvshare.region import SlotTable
from kvshare.slots import Recovered, RecoveredBlocks
from kvshare.soiled import Soiled
from kvshare.tenants import Tenants

NO_SLOT = (-1, 0)
EXPIRED_AT_ONCE = 2000  # blocks that one `expire` gives up, so that it takes no more than milliseconds
_U64_MASK = (1 << 64) - 1


class Reservation(NamedTuple):
    key: bytes
    generation: int
    length: int
    owner: int
    expires: int  # seconds since 2020; 0: never


class Store:
    """See the module's docstring. policy: what leaves first; default `S3Fifo`. quota: shared by a tier; default: no limits."""

    def __init__(self, region: SlotTable, settings: Settings, policy: Policy | None = None, quota: Quota | None = None) -> None:
        self._region = region
        self._policy: Policy = policy if policy is not None else S3Fifo()
        self._quota = quota if quota is not None else Quota(Tenants(), 0)
        self._expiries = Expiries()
        self._quarantine_seconds = settings.quarantine_seconds
        self._index: dict[bytes, Stored] = {}
        self._keys: dict[int, bytes] = {}  # slot -> key, of what is indexed
        self._reserved: dict[int, Reservation] = {}
        self._being_written: set[bytes] = set()  # keys of the reservations
        self._resting: deque[tuple[float, int]] = deque()  # (time of its end, slot), in order of time
        self._removed: list[bytes] = []
        self.gate: Gate | None = None  # says which keys may not be kept here; None: all may
        self.soiled = Soiled()
        self._slots = 0
        self._free: list[int] = []  # taken from the end
        counted = "stored evicted dropped corrupt expired over_quota present no_room barred ignored"
        self._counts = dict.fromkeys(counted.split(), 0)
        self.extend()

    # --- questions ----------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._index)

    def lookup(self, keys: Sequence[bytes]) -> list[Stored | None]:
        """What is held under each key, None where nothing is."""
        held = self._index.get
        found = [held(key) for key in keys]
        if self._expiries:
            second = self._quota.second()
            return [None if block is None or 0 < block.expires <= second else block for block in found]
        return found

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
        """When `expire` has something to do; None when nothing rests and no block ends."""
        moments = [self._resting[0][0]] if self._resting else []
        second = self._expiries.next()
        if second is not None:
            moments.append(self._quota.moment(second))
        return min(moments, default=None)

    @property
    def counters(self) -> dict[str, int]:
        """What happened since the start (stored, evicted, dropped, corrupt, expired; over_quota: blocks that left for others of
        their tenant, and reservations that it was refused; of reservations: present, no_room, barred; ignored: commits and the
        like that came too late), and what is now (blocks, bytes, free_slots, reserved_slots, resting_slots)."""
        return self._counts | {
            "blocks": len(self._index),
            "bytes": len(self._index) * self._region.slot_bytes,
            "free_slots": len(self._free),
            "reserved_slots": len(self._reserved),
            "resting_slots": len(self._resting),
        }

    # --- saving -------------------------------------------------------------------------------------------------------

    def reserve(
        self, keys: Sequence[bytes], length: int, owner: int, now: float, expires: Sequence[int] = ()
    ) -> list[tuple[int, int]]:
        """A slot and its odd generation for each of ``keys``, blocks of ``length`` bytes; ``(-1, 0)`` where there is nothing to
        write: the block is here, is being written, is over, or there is no room. Evicts what is coldest when nothing is free.

        expires: of blocks that are copies of others, the second since 2020 at which each of those ends, 0 where it doesn't.
        """
        self.expire(now)
        if not 0 < length <= self._region.slot_bytes:
            return [NO_SLOT] * len(keys)
        ends = expires or [0] * len(keys)
        return [self._reserve(key, length, owner, now, end) for key, end in zip(keys, ends, strict=True)]

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
            self._quota.enter(block.key, self._region.slot_bytes, self)
        return accepted

    def abort(self, slots: Sequence[int], generations: Sequence[int], owner: int) -> None:
        """These will not be written, and nobody is writing them: free at once. Ignores what `commit` would ignore."""
        for slot, generation in zip(slots, generations, strict=False):
            if self._take(slot, generation, owner) is not None:
                self._release_slot(slot)

    def release(self, owner: int, now: float) -> None:
        """An owner is gone, maybe while writing: what it reserved rests."""
        for slot in [slot for slot, reservation in self._reserved.items() if reservation.owner == owner]:
            self._end_reservation(slot)
            self._rest(slot, now)

    def expire(self, now: float) -> None:
        """Slots that have rested long enough are free again, and blocks whose time is over leave."""
        while self._resting and self._resting[0][0] <= now:
            slot = self._resting.popleft()[1]
            if self.soiled.rested(slot):
                self._soil(slot)
            else:
                self._release_slot(slot)
        if self._expiries:
            self.drop(self._expiries.due(self._quota.second(now), EXPIRED_AT_ONCE), "expired")

    # --- use ----------------------------------------------------------------------------------------------------------

    def touch(self, keys: Sequence[bytes], missed: Sequence[bytes] = ()) -> None:
        """These, the beginning of a chain, were asked for and found; its rest was ``missed``. Unknown ones are ignored."""
        self._policy.follow([*keys, *missed])
        for key in keys:
            self._policy.touch(key)
        self._quota.touch(keys)

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

    def drop(self, keys: Sequence[bytes], counted: str = "dropped") -> None:
        """Give these up, and count them as what is said; unknown ones are ignored."""
        for key in keys:
            if key in self._index:
                self._policy.remove(key)
                self._release_slot(self._forget(key).slot)
                self._counts[counted] += 1

    # --- purging ------------------------------------------------------------------------------------------------------

    def begin_purge(self, matches: Matches, now: float) -> None:
        """Reservations of keys that match end, and their generations: what is written yet is not committed."""
        for slot in [slot for slot, reservation in self._reserved.items() if matches(reservation.key)]:
            self._end_reservation(slot)
            self._region.begin(slot)  # somebody may still be writing there
            self._rest(slot, now)

    def purge(self, keys: Sequence[bytes]) -> None:
        """As `drop`, and their slots are soiled."""
        for key in keys:
            if key in self._index:
                self._policy.remove(key)
                self._soil(self._forget(key).slot)
                self._counts["dropped"] += 1

    def end_purge(self) -> None:
        """Whatever is free and may hold bytes of former blocks is soiled; what rests will be when it has."""
        self.soiled.spoil(slot for _, slot in self._resting)
        self._free = self.soiled.sift(self._free)

    def cleaned(self, slots: Sequence[int]) -> None:
        """These, of `Soiled.take`, hold nothing but zeros: they are free."""
        self.soiled.cleaned(slots)
        self._free += slots

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
        # What an earlier owner wrote there, generations tell.
        self.soiled.extend((self._region.generations(np.arange(self._slots, available)) != 0).tobytes())
        self._slots = available

    def adopt(self, recovered: Sequence[Recovered], unsettled: Sequence[int] = (), now: float = 0.0) -> list[Stored]:
        """Enter what an arena found at its start, before anything is reserved; returns it. ``unsettled`` slots rest first."""
        assert not self._index and not self._reserved
        slots, keys, lengths, generations, ends = RecoveredBlocks.of(recovered).columns
        ends = self._quota.until_all(keys, now, ends)
        self._index = self._admitted([*map(Stored, keys, repeat(self._region.region), slots, generations, lengths, ends)])
        adopted = list(self._index.values())
        self._keys = dict(zip([block.slot for block in adopted], self._index, strict=True))
        for block in adopted if any(ends) else ():
            if block.expires:
                self._expiries.add(block.key, block.expires)
        self._policy.insert_all(reversed(self._index))
        self._quota.enter_all(list(reversed(self._index)), self._region.slot_bytes, self)
        resting = set(unsettled) - self._keys.keys()
        taken = resting.union(self._keys, self.soiled)
        self._free = [slot for slot in self._free if slot not in taken]
        for slot in sorted(resting):
            self._rest(slot, now)
        self._quota.settle()
        return [block for block in adopted if block.key in self._index] if self._removed else adopted

    def check(self) -> list[str]:
        """Problems found here, in the policy and in the region's headers, one sentence each; empty when all is well."""
        resting = [slot for _, slot in self._resting]
        homes = [*self._free, *self._reserved, *self._keys, *resting, *self.soiled]
        problems = [*self._region.check(), *self._policy.check()]
        if sorted(homes) != list(range(self._slots)):
            problems.append(f"{len(homes)} places for {self._slots} slots, {len(set(homes))} different ones")
        if {key: self._index[key].slot for key in self._index} != {key: slot for slot, key in self._keys.items()}:
            problems.append("keys by slot and slots by key differ")
        if len(self._policy) != len(self._index) or any(key not in self._policy for key in self._index):
            problems.append(f"the policy orders {len(self._policy)} keys, the index has {len(self._index)}")
        if self._being_written != {reservation.key for reservation in self._reserved.values()}:
            problems.append("keys being written are not those of the reservations")
        if self._expiries.pairs() != {(key, block.expires) for key, block in self._index.items() if block.expires}:
            problems.append("keys by the end of their time are not those of the index")
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

    def _reserve(self, key: bytes, length: int, owner: int, now: float, end: int) -> tuple[int, int]:
        if not 0 < len(key) <= KEY_BYTES_MAX:
            return NO_SLOT
        if key in self._index or key in self._being_written:
            self._counts["present"] += 1
            return NO_SLOT
        if self.gate is not None and self.gate.bars(key):
            self._counts["barred"] += 1
            return NO_SLOT
        end = self._quota.until(key, now, end)
        if 0 < end <= self._quota.second(now):
            return NO_SLOT
        if not self._quota.reserve(key, self._region.slot_bytes):
            self._counts["over_quota"] += 1
            return NO_SLOT
        slot = self._free.pop() if self._free else self._evict()
        if slot is None:
            self._counts["no_room"] += 1
            self._quota.end(key, self._region.slot_bytes)
            return NO_SLOT
        generation = self._region.begin(slot)
        self.soiled.wrote(slot)
        self._reserved[slot] = Reservation(key, generation, length, owner, end)
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
        key, generation, length, _, expires = reservation
        generation = self._region.finish(slot, generation, key, length, checksum, expires)
        block = Stored(key, self._region.region, slot, generation, length, expires)
        self._index[key] = block
        self._keys[slot] = key
        if expires:
            self._expiries.add(key, expires)
        return block

    def _admitted(self, found: list[Stored]) -> dict[bytes, Stored]:
        """By key, what may be adopted: no second copies, and nothing that is barred."""
        unique = {block.key: block for block in found}
        for block in found if len(unique) < len(found) else ():
            if unique[block.key] is not block:
                self._region.retire(block.slot)
        if self.gate is not None and self.gate.active:
            for key in [key for key in unique if self.gate.bars(key)]:
                self._soil(unique.pop(key).slot)
                self._counts["barred"] += 1
        return unique

    def _take(self, slot: int, generation: int, owner: int) -> Reservation | None:
        """End a reservation; None, and counted, when it is not (any more) the owner's."""
        reservation = self._reserved.get(slot)
        if reservation is None or (reservation.generation, reservation.owner) != (generation, owner):
            self._counts["ignored"] += 1
            return None
        return self._end_reservation(slot)

    def _end_reservation(self, slot: int) -> Reservation:
        reservation = self._reserved.pop(slot)
        self._being_written.discard(reservation.key)
        self._quota.end(reservation.key, self._region.slot_bytes)
        return reservation

    def _forget(self, key: bytes) -> Stored:
        block = self._index.pop(key)
        del self._keys[block.slot]
        if block.expires:
            self._expiries.discard(key, block.expires)
        self._quota.leave(key, self._region.slot_bytes)
        self._removed.append(key)
        return block

    def _rest(self, slot: int, now: float) -> None:
        self._resting.append((now + self._quarantine_seconds, slot))

    def _release_slot(self, slot: int) -> None:
        # Also for a slot that was reserved: a commit that comes yet finds another generation.
        self._region.retire(slot)
        self._free.append(slot)

    def _soil(self, slot: int) -> None:
        self._region.retire(slot)
        self.soiled.add(slot)
