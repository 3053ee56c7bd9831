"""What a donor gives to a group: blocks of a host region, or of an engine's KV cache in host memory.

Threads: a source is used by one thread at a time.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvshare import native
from kvshare.device import DeviceTable
from kvshare.slots import Region
from kvshare.transport.base import BlockStatus, ReadRequest, Targets
from kvshare.transport.group_frames import ROW, U8, U64, Rows
from kvshare.transport.mapped import verify_again, wanted_of

I64 = npt.NDArray[np.int64]


class Source(Protocol):
    """Blocks that a donor broadcasts, all of ``block_bytes``."""

    block_bytes: int

    def __len__(self) -> int: ...

    def gather(self, start: int, stop: int, targets: U64) -> Rows:
        """Copy blocks ``start`` to ``stop`` to ``targets`` (uint64 addresses [blocks]); returns what each must be,
        `ROW` [blocks]. May raise KVShareError or OSError: none of these blocks can be had."""


class RegionSource:
    """Slots of a host region, mapped in this process.

    slots: int64 [n]; generations, seeds: uint64 [n], as in `ReadRequest`; block_bytes: length of each block.
    """

    def __init__(self, region: Region, slots: I64, generations: U64, seeds: U64, block_bytes: int) -> None:
        nowhere = Targets.strided(0, 0, np.zeros(len(slots), np.int64), block_bytes)
        self._region = region
        self._request = ReadRequest(slots, generations, seeds, nowhere)
        self.block_bytes = block_bytes

    def __len__(self) -> int:
        return len(self._request)

    def gather(self, start: int, stop: int, targets: U64) -> Rows:
        region, statuses = self._region, np.empty(len(self), np.uint8)
        wanted = wanted_of(self._request, statuses, start, stop)._replace(targets=targets.reshape(-1, 1))
        places, bounds = (region.table_address, region.data_address), (region.slot_bytes, region.available_slots)
        native.read_slots(places, *bounds, self._request.slots[start:stop], wanted)
        if self.block_bytes < native.FUSED_BYTES_MIN:
            verify_again(wanted, None)
        return _rows(wanted.expected, wanted.checksums, wanted.statuses)


class DeviceSource:
    """Blocks of an engine's KV cache in host memory of this process: its table has generations and no checksums, so what is
    gathered is summed here.

    addresses: uint64 [n, pages] of each block's pages, page_bytes: uint64 [pages]; others as `RegionSource`.

    Raises:
        IndexError: the table has no such slot.
    """

    def __init__(self, table: DeviceTable, slots: I64, generations: U64, seeds: U64, addresses: U64, page_bytes: U64) -> None:
        assert len(slots) == len(generations) == len(seeds) == len(addresses)
        table.generations(slots)
        self._table, self._slots, self._generations, self._seeds = table, slots, generations, seeds
        self._addresses, self._page_bytes = addresses, page_bytes
        self._offsets = np.cumsum(page_bytes) - page_bytes
        self.block_bytes = int(page_bytes.sum())

    def __len__(self) -> int:
        return len(self._slots)

    def gather(self, start: int, stop: int, targets: U64) -> Rows:
        expected, slots = self._generations[start:stop], self._slots[start:stop]
        complete = (expected % np.uint64(2) == 0) & (expected != 0)
        live = np.flatnonzero(complete & (self._table.generations(slots) == expected))
        pages = targets[live, None] + self._offsets[None, :]
        lengths = np.broadcast_to(self._page_bytes, pages.shape)
        checksums = np.zeros(stop - start, np.uint64)
        checksums[live] = native.copy_blocks(pages, self._addresses[start:stop][live], lengths, self._seeds[start:stop][live])
        statuses = np.full(stop - start, BlockStatus.STALE, np.uint8)
        statuses[live[self._table.generations(slots[live]) == expected[live]]] = BlockStatus.OK
        return _rows(expected, checksums, statuses)


def _rows(generations: U64, checksums: U64, statuses: U8) -> Rows:
    rows = np.zeros(len(statuses), ROW)
    rows["generation"], rows["checksum"], rows["status"] = generations, checksums, statuses
    return rows
