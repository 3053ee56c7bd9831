"""Reads of regions that are mapped in this process: the copying half of the `shm` and `loopback` transports.

    a portion: admit by generation ── copy and checksum what lands ── generations again ── judge

Threads: as `kvshare.transport.portions`.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kvshare import native
from kvshare.transport.base import BlockStatus, ReadRequest, Tamper
from kvshare.transport.portions import PortionTransport

if TYPE_CHECKING:
    from kvshare.places import RegionDescription
    from kvshare.slots import Region

U8 = npt.NDArray[np.uint8]


def verify_again(wanted: native.Wanted, tamper: Tamper | None) -> int:
    """What the native calls leave to Python: digests of blocks too short for them, and of blocks that are tampered with.
    Returns how many are OK."""
    landed = np.flatnonzero(wanted.statuses == BlockStatus.OK)
    targets = wanted.targets[landed]
    lengths = np.broadcast_to(wanted.page_bytes, targets.shape)
    if tamper is not None:
        tamper(targets, lengths)
    digests = native.checksums(targets, lengths, wanted.seeds[landed])
    corrupt = landed[digests != wanted.checksums[landed]]
    wanted.statuses[corrupt] = BlockStatus.CORRUPT
    return len(landed) - len(corrupt)


def wanted_of(request: ReadRequest, statuses: U8, start: int, stop: int) -> native.Wanted:
    """Blocks ``start`` to ``stop`` of a request whose arrays are contiguous."""
    expected, seeds = request.generations[start:stop], request.seeds[start:stop]
    targets = request.targets.addresses[start:stop]
    checksums = np.empty(stop - start, np.uint64)
    return native.Wanted(expected, seeds, checksums, targets, request.targets.page_bytes, statuses[start:stop])


class MappedTransport(PortionTransport):
    """A transport whose regions are mapped in this process: reads are copies. An implementor says where a region's mapping
    comes from."""

    @abstractmethod
    def region_of(self, description: RegionDescription) -> Region:
        """The mapped region. Raises OSError or KVShareError when there is none (any more)."""

    def read_portion(self, description: RegionDescription, request: ReadRequest, statuses: U8, start: int, stop: int) -> int:
        region = self.region_of(description)
        wanted = wanted_of(request, statuses, start, stop)
        places, bounds = (region.table_address, region.data_address), (region.slot_bytes, region.available_slots)
        ok = native.read_slots(places, *bounds, request.slots[start:stop], wanted)
        if self.tamper is not None or request.targets.block_bytes < native.FUSED_BYTES_MIN:
            ok = verify_again(wanted, self.tamper)
        return ok
