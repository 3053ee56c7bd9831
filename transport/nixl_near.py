"""The short way of a portion: blocks of a device region whose table is mapped here, over a lane that is done when it is asked.

A read of 64 KiB takes NIXL some ten microseconds, so every call counts: no arrays for few pages, lists of all pages of both
sides prepared for good. Whatever is out of the ordinary takes the long way, `kvshare.transport.nixl_reads.Portion`.

Threads: a portion is read by one.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvshare import native
from kvshare.device import STRIDE
from kvshare.transport.base import U64, BlockStatus, ReadRequest, Transfer
from kvshare.transport.nixl_agent import I32
from kvshare.transport.nixl_landing import PAGES_MAX, Range, Registered
from kvshare.transport.nixl_lane import Lane, Route

U8 = npt.NDArray[np.uint8]
FEW_PAGES = 64  # arrays cost more
_EVEN = bytes(range(0, 256, 2))


def read_near(
    lane: Lane,
    route: Route,
    registered: Registered,
    transfer: Transfer,
    request: ReadRequest,
    statuses: U8,
    start: int,
    stop: int,
) -> int | None:
    """Write the statuses of blocks ``start`` to ``stop``, return how many are OK; None: take the long way. Errors as there."""
    table, targets = route.table, request.targets
    length = route.uniform(targets.page_bytes)
    if table is None or not lane.inline or targets.block_bytes != route.slot_bytes or not length:
        return None
    slots, expected = request.slots[start:stop], request.generations[start:stop]
    addresses, wanted = targets.addresses[start:stop], expected.tobytes()
    if not _plausible(wanted):
        return None
    few = addresses.size <= FEW_PAGES
    if few:
        places, numbers = addresses.ravel().tolist(), slots.tolist()
        bounds = min(places), max(places) + length, min(numbers), max(numbers)
    else:
        bounds = int(addresses.min()), int(addresses.max()) + length, int(slots.min()), int(slots.max())
    within = registered.find(bounds[0], bounds[1])
    if within is None or bounds[2] < 0 or bounds[3] >= route.slots:
        return None
    prepared = _prepared(lane, route, registered, within, length)
    local = _indices_of_few(places, within.start, length) if few else _indices(addresses, within.start, length)
    if local is None or prepared is None:
        return None
    if addresses.shape[1] > 1 or not few:
        remote = (slots[:, None] + np.arange(addresses.shape[1]) * route.slots).astype(np.int32).ravel()
    else:
        remote = numbers
    generations = np.empty(stop - start, np.uint64)
    native.load_generations(table.table_address, STRIDE, slots, generations)
    if generations.tobytes() != wanted:
        return None
    handle = lane.agent.request_prepared(prepared[0], local, prepared[1], remote)
    lane.carry(handle, transfer, request.seconds, None, within.place, targets.block_bytes * (stop - start))
    native.load_generations(table.table_address, STRIDE, slots, generations)
    if generations.tobytes() == wanted:
        statuses[start:stop] = 0  # OK
        return stop - start
    held = generations == expected
    statuses[start:stop] = np.where(held, BlockStatus.OK, BlockStatus.STALE)
    return int(np.count_nonzero(held))


def _plausible(generations: bytes) -> bool:
    """Are all of these (8 bytes each, little-endian) even and surely not 0? As they have the time in their high bits."""
    return not generations[::8].translate(None, _EVEN) and 0 not in generations[7::8]


def _prepared(lane: Lane, route: Route, registered: Registered, within: Range, length: int) -> tuple[int, int] | None:
    """Lists of all pages of that length: of the targets' memory and of the route. None: they would be too long."""
    ours, theirs = within.lists.get(length), route.lists.get(length)
    if ours is None or theirs is None:
        pages = max(route.slots * len(route.page_bytes), (within.end - within.start) // length)
        if pages > PAGES_MAX:
            return None
        ours, theirs = registered.pages(within, length), route.pages(lane, length)
    return ours, theirs


def _indices_of_few(addresses: list[int], base: int, length: int) -> list[int] | None:
    """Numbers of pages that lie side by side from ``base``; None: some do not."""
    found = [(address - base) // length for address in addresses]
    if sum(found) * length + len(found) * base != sum(addresses):  # no rest is negative
        return None
    return found


def _indices(addresses: U64, base: int, length: int) -> I32 | None:
    pages, rests = np.divmod(addresses - np.uint64(base), np.uint64(length))
    return None if rests.any() else pages.astype(np.int32).ravel()
