"""Where bytes that NIXL fetches may land: memory of ours for them all, and the callers' own where it was registered.

    Slab   │ scratch: words of tables │ room for blocks │      ours, registered

Nothing ends a transfer that is under way, neither its release nor the peer's disconnection: what it writes to must not be used
until it is known to be over. So where a peer may leave a transfer hanging its bytes land in a slab, from which verified blocks
are copied; a slab whose transfer was given up stays in quarantine, with all that it needs, until NIXL says that it is over.

Threads: all methods from any thread.
"""

from __future__ import annotations

import bisect
import threading
import time
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvshare.errors import TransportError
from kvshare.mapping import Mapping
from kvshare.transport.nixl_agent import Agent, Registration
from kvshare.transport.nixl_errors import NixlError

U64 = npt.NDArray[np.uint64]

SCRATCH_BYTES = 1 << 20
ROOM_BYTES_MIN = 4 << 20  # of a slab, if it has any
SLAB_BYTES_MAX = 512 << 20  # of all slabs together, those in quarantine included
FREE_SLABS_MAX = 4  # kept of each size: first use of new memory costs more than a copy


class Slab:
    """Registered memory: `SCRATCH_BYTES` at ``scratch``, ``room_bytes`` at ``room``."""

    def __init__(self, agent: Agent, room_bytes: int) -> None:
        self.memory = Mapping.anonymous(SCRATCH_BYTES + room_bytes)
        self.scratch, self.room = self.memory.address, self.memory.address + SCRATCH_BYTES
        self.room_bytes = room_bytes
        self.registration = agent.register([(self.memory.address, self.memory.length)])

    @property
    def length(self) -> int:
        return self.memory.length


class _Abandoned(NamedTuple):
    """A transfer that was given up before its end, and what it may still write to."""

    peer: str
    handle: int
    slab: Slab | None
    targets: tuple[tuple[int, int], ...]  # of a caller: address and length
    hung: bool  # or only cancelled


class Landing:
    """See the module's docstring. ``agent``: whose memory it is."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._free: dict[int, list[Slab]] = {}  # by room
        self._bytes = 0
        self.abandoned: list[_Abandoned] = []  # transfers in quarantine
        self._changed = threading.Condition()

    # --- slabs --------------------------------------------------------------------------------------------------------

    def take(self, room_bytes: int, seconds: float) -> Slab:
        """A slab with at least this room, for one thread, until `give`.

        Raises:
            TransportError: too many are in use for ``seconds``, or NIXL cannot register one.
        """
        room = max(ROOM_BYTES_MIN, 1 << (room_bytes - 1).bit_length()) if room_bytes else 0
        deadline = time.monotonic() + seconds
        with self._changed:
            while not self._free.get(room):
                length = SCRATCH_BYTES + room
                if self._bytes + length <= SLAB_BYTES_MAX or not self._bytes:
                    self._bytes += length
                    break
                if (left := deadline - time.monotonic()) <= 0:
                    raise TransportError(
                        f"no memory to land in: {len(self.abandoned)} transfers of peers that hang hold theirs"
                    )
                self._trim()
                self._changed.wait(min(left, 0.05))
                self._reap()
            else:
                return self._free[room].pop()
        try:
            return Slab(self._agent, room)
        except (OSError, NixlError):
            with self._changed:
                self._bytes -= length
            raise

    def give(self, slab: Slab) -> None:
        with self._changed:
            free = self._free.setdefault(slab.room_bytes, [])
            if len(free) < FREE_SLABS_MAX:
                free.append(slab)
            else:
                self._drop(slab)
            self._changed.notify_all()

    def _trim(self) -> None:
        """Locked: somebody needs another size."""
        for free in self._free.values():
            while free:
                self._drop(free.pop())

    def _drop(self, slab: Slab) -> None:
        self._bytes -= slab.length
        self._agent.deregister(slab.registration)

    # --- quarantine ---------------------------------------------------------------------------------------------------

    def abandon(self, peer: str, handle: int, slab: Slab | None, targets: tuple[tuple[int, int], ...], hung: bool) -> None:
        """Take over a transfer that is not over, its slab and a hold on its peer. hung: the peer had all the time there is."""
        with self._changed:
            self.abandoned.append(_Abandoned(peer, handle, slab, targets, hung))

    def hangs(self, peer: str) -> bool:
        """Has this peer transfers that were given up for its silence and are not over?"""
        with self._changed:
            self._reap()
            return any(one.peer == peer and one.hung for one in self.abandoned)

    def quarantined(self) -> list[tuple[int, int]]:
        """Callers' memory (address, length) that transfers which were given up may still write to."""
        with self._changed:
            self._reap()
            return [place for one in self.abandoned for place in one.targets]

    def _reap(self) -> None:
        """Locked: take back what is over."""
        left = []
        for one in self.abandoned:
            try:
                over = self._agent.done(one.handle)
            except NixlError:  # it has failed, and the connection is closed: nothing comes any more
                over = True
            if not over:
                left.append(one)
                continue
            self._agent.release(one.handle)
            self._agent.let_go(one.peer)
            if one.slab is not None:
                self._free.setdefault(one.slab.room_bytes, []).append(one.slab)
        self.abandoned = left

    def close(self) -> None:
        """Deregister what can be; the agent is closed next, and what is in quarantine lives until then."""
        with self._changed:
            self._reap()
            self._trim()
            for one in self.abandoned:
                self._agent.release(one.handle)


class Range(NamedTuple):
    """Memory of a caller that is registered: [start, end)."""

    start: int
    end: int
    kind: str
    device: int
    registration: Registration
    place: tuple[tuple[int, int], ...]  # address and length, for `Landing.abandon`
    lists: dict[int, int]  # prepared lists of all pages of one length, by that length


PAGES_MAX = 1 << 20  # of one prepared list


def _start(one: Range) -> int:
    return one.start


class Registered:
    """Callers' memory in which blocks may land directly: what `add` was told of."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._ranges: list[Range] = []
        self._last: Range | None = None  # that was found
        self._lock = threading.Lock()

    def add(self, address: int, length: int, kind: str, device: int) -> None:
        """Register a range; nothing if it lies within one that is. Raises NixlError."""
        if self.find(address, address + length) is not None:
            return
        registration = self._agent.register([(address, length)], kind, device)
        with self._lock:
            added = Range(address, address + length, kind, device, registration, ((address, length),), {})
            self._ranges = sorted([*self._ranges, added], key=_start)

    def remove(self, address: int, length: int) -> None:
        """Forget what lies within this range; no read into it may run. Nothing where nothing is."""
        with self._lock:
            gone = [one for one in self._ranges if address <= one.start and one.end <= address + length]
            self._ranges = [one for one in self._ranges if one not in gone]
            self._last = None
        for one in gone:
            for prepared in one.lists.values():
                self._agent.release_list(prepared)
            self._agent.deregister(one.registration)

    def clear(self) -> None:
        self.remove(0, 1 << 64)

    def find(self, start: int, end: int) -> Range | None:
        """The range that all of [start, end) lies in."""
        last = self._last
        if last is not None and last.start <= start and end <= last.end:
            return last
        ranges = self._ranges  # replaced, never changed
        at = bisect.bisect_right(ranges, start, key=_start) - 1
        if at >= 0 and end <= ranges[at].end:
            self._last = ranges[at]
            return ranges[at]
        return None

    def pages(self, within: Range, length: int) -> int:
        """A prepared list of the range's pages of ``length`` bytes side by side. Raises NixlError."""
        prepared = within.lists.get(length)
        if prepared is not None:
            return prepared
        with self._lock:
            if length not in within.lists:
                count = (within.end - within.start) // length
                row = np.array([[within.start, length, within.device, length, count]], np.uint64)
                within.lists[length] = self._agent.prepare_local(row, within.kind)
            return within.lists[length]
