"""A disk region as peers read it: blocks are brought into a buffer of the data server, verified, and sent from there.

Threads: the data server's; what the disk does runs in the tier's (`kvshare.blocking`), so a disk that does not answer holds no
server's thread for longer than ``disk_seconds``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kvshare.blocking import Blocking
from kvshare.disk import DiskRegion
from kvshare.mapping import Mapping
from kvshare.native import I64, U8, U64, BlockStatus


class Served:
    """See the module's docstring and `kvshare.transport.tcp_staged.Staged`. ``damaged(region, slots, generations)`` hears, in
    any thread, of blocks that failed their verification."""

    def __init__(self, region: DiskRegion, blocking: Blocking, damaged: Callable[[DiskRegion, I64, U64], None]) -> None:
        self.region, self.slot_bytes = region.region, region.slot_bytes
        self._disk = region
        self._blocking = blocking
        self._damaged = damaged

    @property
    def available_slots(self) -> int:
        return self._disk.available_slots

    def key(self, slot: int) -> bytes:
        return self._disk.key(slot)

    def current(self, slots: I64, generations: U64, length: int) -> U8:
        if self._blocking.away:
            return np.full(len(slots), BlockStatus.UNREACHABLE, np.uint8)
        statuses = np.full(len(slots), BlockStatus.STALE, np.uint8)
        within = np.flatnonzero((slots >= 0) & (slots < self._disk.available_slots))
        lengths = self._disk.lengths(slots[within])
        same = (self._disk.generations(slots[within]) == generations[within]) & (lengths == length)
        complete = (generations[within] % 2 == 0) & (generations[within] != 0)
        statuses[within[same & complete]] = BlockStatus.OK
        return statuses

    def stage(self, slots: I64, generations: U64, target: Mapping, stride: int, length: int) -> tuple[U8, U64]:
        disk = self._disk
        checksums = disk.checksums(slots)
        keys = [disk.key(slot) for slot in slots.tolist()]
        addresses = [target.address + i * stride for i in range(len(slots))]

        def work() -> U8:
            assert target.memory is not None  # kept until we are done
            return disk.read(slots.tolist(), generations.tolist(), keys, addresses, length)

        statuses = self._blocking.call(work)
        corrupt = statuses == BlockStatus.CORRUPT
        if corrupt.any():
            self._damaged(disk, slots[corrupt], generations[corrupt])
        return statuses, checksums
