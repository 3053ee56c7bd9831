"""Reads through NIXL, portion by portion: which blocks, by which lane, into what memory, and what they are found to be.

    table's words ── admit ── READ of the bytes ── table's words again ── (copy out) ── checksums ── judge

The words are generations, with a host region whole headers. They come from the table's file where it is mapped here, else by
READs of their own, posted when the bytes have come. A host region is served as long as a word in its table's first page, which
the owner's transport writes, says so.

Threads: a read's portions are done by the transport's threads and by whoever waits for it, each by one.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvshare import native
from kvshare.errors import KVShareError, TransportError
from kvshare.region import FORMAT_VERSION, HEADER, MAGIC, SUPERBLOCK, SUPERBLOCK_BYTES
from kvshare.transport import ranges
from kvshare.transport.base import I64, U64, BlockStatus, Completion, ReadRequest, Tamper, Transfer
from kvshare.transport.mapped import verify_again, wanted_of
from kvshare.transport.nixl_agent import DRAM
from kvshare.transport.nixl_landing import Landing, Range, Registered, Slab
from kvshare.transport.nixl_lane import Cancelled, Hung, Lane, Route

if TYPE_CHECKING:
    from kvshare.places import RegionDescription
    from kvshare.transport.nixl import NixlTransport

U8 = npt.NDArray[np.uint8]

PORTION_BYTES = 4 << 20
PORTION_BYTES_NEAR = 16 << 20  # where nothing is verified in between, and nothing can hang
PORTION_BYTES_VRAM = 64 << 20  # which moves much faster than we can ask for it
PORTION_BLOCKS_MAX = 4096
TOGETHER_BYTES = 8 << 10  # so many bytes cost no more than one more range
THREADS_PER_READ = 2  # one copies while the other verifies

# A word of a host table's first page, which its format leaves free: 1 while the owner serves the region through NIXL.
SERVED_OFFSET = SUPERBLOCK_BYTES - 16
_FIRST_PAGE = np.dtype([("superblock", SUPERBLOCK), ("unused", f"V{SERVED_OFFSET - SUPERBLOCK.itemsize}"), ("served", "<u8")])


class Heads(NamedTuple):
    """What a table says of slots: [n] each; checksums of a device region say nothing."""

    generations: U64
    checksums: U64
    lengths: U64


class Portion:
    """Blocks ``start`` to ``stop`` of a request. ``registered``: callers' memory that may be written to directly."""

    def __init__(
        self, lane: Lane, route: Route, landing: Landing, registered: Registered, transfer: Transfer, tamper: Tamper | None
    ) -> None:
        self._lane, self._route, self._landing, self._registered = lane, route, landing, registered
        self._transfer, self._tamper = transfer, tamper
        self._slab: Slab | None = None
        self._seconds = 0.0

    def read(self, request: ReadRequest, statuses: U8, start: int, stop: int) -> int:
        """Write the blocks' statuses and return how many are OK. The peer is held by the caller.

        Raises:
            Hung, Cancelled, TransportError: none is OK.
        """
        self._seconds = request.seconds
        wanted = wanted_of(request, statuses, start, stop)
        try:
            return self._read(request.slots[start:stop], wanted, request.targets.block_bytes)
        except (Hung, Cancelled):
            self._slab = None  # in quarantine
            raise
        finally:
            if self._slab is not None:
                self._landing.give(self._slab)

    def _read(self, slots: I64, wanted: native.Wanted, block_bytes: int) -> int:
        route, expected = self._route, wanted.expected
        within = self._direct(wanted)
        room = 0 if within is not None else len(slots) * block_bytes
        if room or route.table is None:
            self._slab = self._landing.take(room, self._seconds)
        wanted.statuses[:] = BlockStatus.STALE
        if block_bytes != route.slot_bytes if route.device else block_bytes > route.slot_bytes:
            return 0
        chosen = self._possible(slots, expected)
        heads = self._heads(slots[chosen])
        wanted.checksums[chosen] = heads.checksums
        chosen = chosen[(heads.generations == expected[chosen]) & (heads.lengths == np.uint64(block_bytes))]
        if not len(chosen):
            return 0
        if within is not None:
            self._fetch_direct(slots[chosen], wanted.targets[chosen], wanted.page_bytes, within)
        else:
            self._fetch_to_slab(slots[chosen], block_bytes)
        held = self._heads(slots[chosen], served=True).generations == expected[chosen]
        wanted.statuses[chosen[held]] = BlockStatus.OK
        if within is None:
            self._copy_out(wanted, chosen, np.flatnonzero(held), block_bytes)
        if route.device:
            return int(np.count_nonzero(held))
        return verify_again(wanted, self._tamper)

    # --- tables -------------------------------------------------------------------------------------------------------

    def _possible(self, slots: I64, expected: U64) -> I64:
        """Which of the blocks there can be at all."""
        possible = (slots >= 0) & (slots < self._route.slots) & (expected % np.uint64(2) == 0) & (expected != 0)
        if not self._route.device and (slots[possible] >= self._route.available).any():
            self._see_page()
            possible &= slots < self._route.available
        return np.flatnonzero(possible)

    def _heads(self, slots: I64, served: bool = False) -> Heads:
        """What the table says now. served: a host region is found to be served still."""
        route = self._route
        if not len(slots):
            return Heads(*(np.empty(0, np.uint64) for _ in range(3)))
        if route.device:
            words = route.table.generations(slots) if route.table is not None else self._words(slots, np.dtype("<u8"), served)
            return Heads(words, np.zeros_like(words), np.full_like(words, route.slot_bytes))
        found = self._words(slots, HEADER, served)
        return Heads(found["generation"], found["checksum"], found["length"].astype(np.uint64))

    def _words(self, slots: I64, kind: np.dtype[Any], served: bool) -> npt.NDArray[Any]:
        """What lies at the slots' places in the table, [n] of ``kind``, in one READ."""
        assert self._slab is not None
        memory, base, bytes_each = self._route.memory, self._slab.scratch + SUPERBLOCK_BYTES, kind.itemsize
        low, high = int(slots.min()), int(slots.max())
        span = (high - low) * memory.table_stride + bytes_each
        together = span <= min(self._slab.room - base, len(slots) * TOGETHER_BYTES)
        if together:
            places: list[Any] = [[base], [memory.table_address + low * memory.table_stride], [span]]
            landed = np.ndarray((high - low + 1,), kind, native.view(base, span), 0, (memory.table_stride,))
        else:
            sources = ranges.page_addresses([memory.table_address], [memory.table_stride], slots).reshape(-1)
            places = [base + np.arange(len(slots)) * bytes_each, sources, np.full(len(slots), bytes_each)]
            landed = np.ndarray((len(slots),), kind, native.view(base, len(slots) * bytes_each))
        page = served and not self._route.device
        if page:
            first = (self._slab.scratch, memory.table_address - SUPERBLOCK_BYTES, SUPERBLOCK_BYTES)
            places = [[*one, at] for one, at in zip(places, first, strict=True)]
        self._carry(ranges.coalesce(ranges.Spans(*(np.array(one, np.uint64) for one in places))), table=True)
        if page:
            self._judge_page()
        return landed[slots - low] if together else landed.copy()

    def _see_page(self) -> None:
        assert self._slab is not None
        at = self._route.memory.table_address - SUPERBLOCK_BYTES
        one = np.array([[self._slab.scratch], [at], [SUPERBLOCK_BYTES]], np.uint64)
        self._carry(ranges.Spans(*one), table=True)
        self._judge_page()

    def _judge_page(self) -> None:
        """Raises TransportError: the first page says that this is not the region that was described, or is not served."""
        assert self._slab is not None
        description = self._route.description
        page = np.frombuffer(native.view(self._slab.scratch, _FIRST_PAGE.itemsize), _FIRST_PAGE)[0]
        found, ours = page["superblock"], (MAGIC, FORMAT_VERSION, HEADER.itemsize, description.slot_bytes, description.slots)
        if int(page["served"]) != 1:
            raise TransportError(f"node {description.node!r} no longer serves region {description.region} through NIXL")
        if tuple(found[name] for name in ("magic", "version", "header_bytes", "slot_bytes", "slots")) != ours:
            raise TransportError(
                f"region {description.region} of node {description.node!r} has another version or size than was described; "
                "run one version of kvshare on all hosts"
            )
        self._route.available = int(found["available_slots"])

    # --- bytes --------------------------------------------------------------------------------------------------------

    def _direct(self, wanted: native.Wanted) -> list[Range] | None:
        """The registered memory in which each page of the targets lies; None: bytes have to land elsewhere first."""
        targets = wanted.targets
        if targets.size == 1:
            ends = [(int(targets[0, 0]), int(targets[0, 0]) + int(wanted.page_bytes[0]))]
        elif len(targets):
            last = targets.max(axis=0) + wanted.page_bytes
            ends = list(zip(targets.min(axis=0).tolist(), last.tolist(), strict=True))
        else:
            return None
        found = []
        for start, end in ends:
            one = self._registered.find(start, end)
            if one is None or (one.kind == DRAM and not self._lane.inline):
                return None
            found.append(one)
        return found if len({(one.kind, one.device) for one in found}) == 1 else None

    def _fetch_direct(self, slots: I64, targets: U64, page_bytes: U64, within: list[Range]) -> None:
        sources = ranges.page_addresses(self._route.memory.bases, self._route.memory.strides, slots)
        copies = ranges.coalesce(ranges.spans(targets, page_bytes, sources, self._route.page_bytes))
        places = tuple(dict.fromkeys(place for one in within for place in one.place))
        self._carry(copies, (within[0].kind, within[0].device), places)

    def _fetch_to_slab(self, slots: I64, block_bytes: int) -> None:
        assert self._slab is not None
        blocks = np.uint64(self._slab.room) + np.arange(len(slots), dtype=np.uint64) * np.uint64(block_bytes)
        sources = ranges.page_addresses(self._route.memory.bases, self._route.memory.strides, slots)
        whole = np.array([block_bytes], np.uint64)
        self._carry(ranges.coalesce(ranges.spans(blocks.reshape(-1, 1), whole, sources, self._route.page_bytes)))

    def _carry(
        self,
        copies: ranges.Spans,
        place: tuple[str, int] = (DRAM, 0),
        targets: tuple[tuple[int, int], ...] = (),
        table: bool = False,
    ) -> None:
        """READ these ranges. place: kind and device of the targets; targets: of a caller. table: it lies in host memory."""
        memory, lane = self._route.memory, self._lane
        source = (DRAM, 0) if table else (memory.kind, memory.device)
        for step in lane.steps(copies, self._seconds):
            local = _rows(step.targets, step.lengths, place[1])
            remote = _rows(step.sources, step.lengths, source[1])
            handle = lane.agent.request(self._route.agent, local, remote, (place[0], source[0]))
            lane.carry(handle, self._transfer, self._seconds, self._slab, targets, int(step.lengths.sum()))

    def _copy_out(self, wanted: native.Wanted, chosen: I64, held: I64, block_bytes: int) -> None:
        """Copy blocks from the slab, where block i of ``chosen`` lies i-th, to their targets."""
        assert self._slab is not None
        pages = np.cumsum(wanted.page_bytes) - wanted.page_bytes
        blocks = np.uint64(self._slab.room) + held.astype(np.uint64) * np.uint64(block_bytes)
        targets = wanted.targets[chosen[held]]
        lengths = np.broadcast_to(wanted.page_bytes, targets.shape)
        native.copy_ranges(targets.reshape(-1), (blocks[:, None] + pages[None, :]).reshape(-1), lengths.reshape(-1))


def _rows(addresses: U64, lengths: U64, device: int) -> U64:
    rows = np.empty((len(addresses), 3), np.uint64)
    rows[:, 0], rows[:, 1], rows[:, 2] = addresses, lengths, device
    return rows


class Read(Transfer):
    """One read: portions that threads take until none is left."""

    _alone = False  # threads would only wait for each other
    _next = _ok = 0
    _error = ""

    def __init__(self, transport: NixlTransport, description: RegionDescription, request: ReadRequest) -> None:
        super().__init__()
        self._transport, self._description, self._request = transport, description, request
        self._began = time.monotonic()
        self._count = self._step = count = len(request)
        self.portions = 1 if count else 0
        block_bytes = request.targets.block_bytes
        if count * block_bytes > PORTION_BYTES or count > PORTION_BLOCKS_MAX:
            most, self._alone = transport.portion_bytes(description)
            self._step = max(1, min(PORTION_BLOCKS_MAX, most // block_bytes))
            self.portions = -(-count // self._step)
        self._left = self.portions
        self._statuses = np.empty(count, np.uint8)
        self._statuses.fill(BlockStatus.CANCELLED)
        self._taking = threading.Lock()
        self.help = self.run
        self.start = self.on_cancel = self._wake

    @property
    def threads(self) -> int:
        """How many of the transport's begin with it at once; what one thread does alone is left to whoever waits for it."""
        return THREADS_PER_READ if self.portions > 1 and not self._alone else 0

    def _wake(self) -> None:
        if not self.threads:
            self._transport.submit(self.run)

    def run(self) -> None:
        """Do portions until all are taken."""
        start = self._take(self._alone)
        while start < self._count:
            stop = min(start + self._step, self._count)
            ok, error = self._do(start, stop)
            with self._taking:
                self._ok += ok
                self._error = self._error or error
                self._left -= 1
                last = self._left == 0
            if last:
                self.finish()
                return
            start = self._take()

    def _take(self, alone: bool = False) -> int:
        """Where the next portion begins; behind the last block when there is none, or, where one thread is to do it all, when
        another one is at it."""
        with self._taking:
            start = self._next
            if alone and start:
                return self._count
            self._next = start + self._step
            return start

    def _do(self, start: int, stop: int) -> tuple[int, str]:
        """How many blocks are OK, and why others are not."""
        status = BlockStatus.UNREACHABLE
        try:
            if self._cancelled:
                return 0, "cancelled"
            ok = self._transport.portion(self._description, self._request, self, self._statuses, start, stop)
            return ok, "" if ok == stop - start else "stale or corrupt blocks"
        except Hung as failure:
            status, error = BlockStatus.TIMEOUT, str(failure)
        except Cancelled as failure:
            status, error = BlockStatus.CANCELLED, str(failure)
        except (OSError, KVShareError) as failure:
            error = str(failure)
        except Exception as failure:  # a fault of ours must not leave the waiter waiting
            error = f"{type(failure).__name__}: {failure}"
        self._statuses[start:stop] = status
        return 0, error

    def finish(self) -> None:
        self._transport.finished(self)
        moved = self._ok * self._request.targets.block_bytes
        self.complete(Completion(self._statuses, moved, time.monotonic() - self._began, self._error))
