"""Group transfers: one donor's blocks to several joiners at once, over a wire that broadcasts.

    donor                                            every joiner
    source ── gather, validated ──> staging ═══════> staging ── copy and checksum ──> targets
              portion i + 1            portion i                portion i - 1

Lifecycle: 1. `announce` makes plan and listener, plans go to the joiners in a control message; 2. all ranks join
(`kvshare.transport.nccl`); 3. the donor calls `broadcast`, each joiner `receive`, any number of times in the same order;
4. `close`.

What is true for every rank:

* A block is `OK` only when the donor found it at its generation before and after it was gathered, and the bytes that lie in the
  joiner's targets have the checksum, seeded with the key, that the donor told under its MAC. All else is a miss.
* Nobody waits longer than ``plan.seconds`` for a portion. A rank that dies, hangs or leaves ends the group for all: what has
  landed stays `OK`, the rest is `TIMEOUT` or `UNREACHABLE`, to be read singly from whoever has it.
* Targets are written by the caller's own thread alone: the `Completion` is a fence, whatever the wire still does to staging.

Threads: one transfer at a time; `cancel` and `close` from any thread. A broadcast under way cannot be interrupted: cancelling
takes effect at the next portion, after at most ``plan.seconds``.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvshare import native
from kvshare.errors import KVShareError, TransportError, Unavailable
from kvshare.places import GroupPlan
from kvshare.transport.base import BlockStatus, Completion, ReadRequest
from kvshare.transport.group import Board, Member
from kvshare.transport.group_frames import OPENING, ROW, U8, U64, Frames, Rows, Shape, row_addresses
from kvshare.transport.group_source import Source

I64 = npt.NDArray[np.int64]

_DONE = b"done"  # what a joiner tells of a transfer that it took to the end


class Broken(TransportError):
    """The group has failed: what has not landed is ``status``."""

    def __init__(self, status: BlockStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Buffer(Protocol):
    """Staging for one frame; ``memory`` uint8 [frame_bytes]."""

    memory: U8


class Wire(Protocol):
    """Broadcasts from rank 0 to all others, one at a time, which end within the plan's ``seconds``."""

    def buffer(self, length: int) -> Buffer: ...

    def start(self, buffer: Buffer) -> None:
        """Broadcast ``buffer``, or receive it; it must not be touched until `finish`. Raises Broken."""

    def finish(self) -> None:
        """Wait for what was started. Raises Broken."""

    def close(self) -> None:
        """Leave, so that nobody waits for us; idempotent. What is under way may still use its buffer."""


class GroupTransfer:
    """One rank's part in a group, whose ranks have found each other; see the module's docstring. Owns notices and wire."""

    def __init__(self, plan: GroupPlan, secret: str, notices: Board | Member, wire: Wire) -> None:
        self.plan = plan
        self._frames = Frames(plan, secret)
        self._notices, self._wire = notices, wire
        self._transfers = 0
        self._broken: Broken | None = None
        self._cancelled = self._closed = self._left = False
        self._using = threading.Lock()
        self._closing = threading.Lock()

    def broadcast(self, source: Source) -> Completion:
        """The donor's side: send all blocks of ``source``. OK in the outcome are those that were sent as such; ``error`` names
        joiners that did not take all to the end. Does not raise for what others do."""
        assert self.plan.rank == 0
        statuses = np.full(len(source), BlockStatus.CANCELLED, np.uint8)
        with self._using:
            return self._run(statuses, source.block_bytes, lambda: self._broadcast(source, statuses))

    def receive(self, request: ReadRequest, positions: I64 | None = None, total_blocks: int | None = None) -> Completion:
        """A joiner's side: take blocks of the donor's next `broadcast` into the targets. Does not raise for what others do.

        request: generations, seeds and targets of the blocks that we want; its slots, and its limit of time, are for those who
        read the rest singly afterwards. positions: int64 [n], ascending, which of the ``total_blocks`` broadcast these are;
        without them, all.
        """
        assert self.plan.rank != 0
        chosen = np.arange(len(request)) if positions is None else positions
        total = len(request) if total_blocks is None else total_blocks
        assert len(chosen) == len(request) and bool((np.diff(chosen) > 0).all())
        assert not len(chosen) or 0 <= chosen[0] <= chosen[-1] < total
        statuses = np.full(len(request), BlockStatus.CANCELLED, np.uint8)
        with self._using:
            landing = _Landing(request, chosen, statuses)
            return self._run(statuses, request.targets.block_bytes, lambda: self._receive(landing, total))

    def cancel(self) -> None:
        """End the running transfer soon, and the group with it. Not a fence: only the `Completion` is."""
        self._cancelled = True

    def close(self) -> None:
        """Leave the group; idempotent. A running transfer is cancelled first and its end waited for."""
        self.cancel()
        with self._closing:
            if self._closed:
                return
            with self._using:
                self._closed = True
                self._leave_wire()
                self._notices.close()

    def __enter__(self) -> GroupTransfer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- both sides -----------------------------------------------------------------------------------------------------

    def _run(self, statuses: U8, block_bytes: int, work: Callable[[], None]) -> Completion:
        began, number, error = time.monotonic(), self._transfers, ""
        self._transfers += 1
        try:
            if self._closed:
                self._broken = Broken(BlockStatus.CANCELLED, "the group is closed")
            if self._broken is not None:
                raise self._broken
            work()
        except Broken as broken:
            self._broken, error = broken, str(broken)
        except Exception as failure:  # a fault of ours must not leave the others waiting for more than their limit
            self._broken = Broken(BlockStatus.UNREACHABLE, f"{type(failure).__name__}: {failure}")
            error = str(self._broken)
        if self._broken is not None:
            statuses[statuses == BlockStatus.CANCELLED] = self._broken.status
            self._leave_wire()  # at once: whoever waits for us learns it now
        if self.plan.rank != 0:
            with contextlib.suppress(Unavailable):
                self._notices.tell(f"left-{number}/{self.plan.rank}", _DONE if self._broken is None else b"failed")
        ok = int(np.count_nonzero(statuses == BlockStatus.OK))
        if not error and ok < len(statuses):
            error = "stale or corrupt blocks"
        return Completion(statuses, ok * block_bytes, time.monotonic() - began, error)

    def _leave_wire(self) -> None:
        if not self._left:
            self._left = True
            self._wire.close()

    def _go_on(self) -> None:
        if self._cancelled:
            raise Broken(BlockStatus.CANCELLED, "cancelled")

    # --- the donor's side -------------------------------------------------------------------------------------------------

    def _broadcast(self, source: Source, statuses: U8) -> None:
        number = self._transfers - 1
        portion_blocks = max(1, min(len(source), self.plan.portion_bytes // max(1, source.block_bytes)))
        shape = Shape(len(source), source.block_bytes, portion_blocks)
        opening = self._wire.buffer(OPENING.frame_bytes)
        self._frames.seal(opening.memory, number, 0, shape, np.empty(0, ROW))
        self._wire.start(opening)
        buffers = [self._wire.buffer(shape.frame_bytes) for _ in range(min(2, shape.portions))]
        sent, travelling = slice(0, 0), np.empty(0, ROW)
        for portion in range(shape.portions):
            # While the one before travels.
            rows = self._gather(source, buffers[portion % 2], number, portion, shape)
            self._wire.finish()
            statuses[sent] = travelling["status"]
            self._go_on()
            self._wire.start(buffers[portion % 2])
            sent, travelling = slice(*shape.bounds(portion)), rows
        self._wire.finish()
        statuses[sent] = travelling["status"]
        # Nobody needs us any more when all have told that they are done; until then our end of the wire must stand.
        assert isinstance(self._notices, Board)
        outcomes = self._notices.outcomes(f"left-{number}", self.plan.seconds)
        late = [str(rank) for rank in range(1, self.plan.ranks) if outcomes.get(rank) != _DONE]
        if late:
            raise Broken(BlockStatus.UNREACHABLE, f"not taken to the end by rank {', '.join(late)}")

    def _gather(self, source: Source, buffer: Buffer, number: int, portion: int, shape: Shape) -> Rows:
        start, stop = shape.bounds(portion)
        try:
            rows = source.gather(start, stop, row_addresses(buffer.memory, shape, stop - start))
        except (OSError, KVShareError):
            rows = np.zeros(stop - start, ROW)
            rows["status"] = BlockStatus.UNREACHABLE
        self._frames.seal(buffer.memory, number, portion, shape, rows)
        return rows

    # --- a joiner's side --------------------------------------------------------------------------------------------------

    def _receive(self, landing: _Landing, total_blocks: int) -> None:
        number, block_bytes = self._transfers - 1, landing.block_bytes
        opening = self._wire.buffer(OPENING.frame_bytes)
        self._wire.start(opening)
        self._wire.finish()
        shape, _ = self._opened(opening, number, 0, 0)
        if (shape.total_blocks, shape.block_bytes) != (total_blocks, block_bytes):
            told = f"{shape.total_blocks} blocks of {shape.block_bytes} bytes"
            raise Broken(BlockStatus.UNREACHABLE, f"the donor sends {told}, not {total_blocks} of {block_bytes}")
        buffers = [self._wire.buffer(shape.frame_bytes) for _ in range(min(2, shape.portions))]
        if buffers:
            self._wire.start(buffers[0])
        for portion in range(shape.portions):
            self._wire.finish()
            if portion + 1 < shape.portions:
                self._go_on()
                self._wire.start(buffers[(portion + 1) % 2])
            start, stop = shape.bounds(portion)
            memory = buffers[portion % 2].memory
            _, rows = self._opened(buffers[portion % 2], number, portion, stop - start)
            landing.take(start, rows, row_addresses(memory, shape, stop - start))

    def _opened(self, buffer: Buffer, number: int, portion: int, blocks: int) -> tuple[Shape, Rows]:
        try:
            return self._frames.opened(buffer.memory, number, portion, blocks)
        except KVShareError as error:
            raise Broken(BlockStatus.UNREACHABLE, str(error)) from None


class _Landing:
    """Where a joiner's blocks go: blocks ``positions`` of the broadcast, to the targets of ``request``."""

    def __init__(self, request: ReadRequest, positions: I64, statuses: U8) -> None:
        self.block_bytes = request.targets.block_bytes
        self._request, self._positions, self._statuses = request, positions, statuses
        self._offsets = np.cumsum(request.targets.page_bytes) - request.targets.page_bytes

    def take(self, start: int, rows: Rows, sources: U64) -> None:
        """Copy what we want of a portion that has landed in staging into the targets, and judge it there.

        start: its first block; rows: [blocks] of it; sources: where they lie, uint64 [blocks].
        """
        request, statuses = self._request, self._statuses
        first, last = np.searchsorted(self._positions, [start, start + len(rows)]).tolist()
        ours = np.arange(first, last)
        told = rows[self._positions[first:last] - start]
        stale = (told["status"] == BlockStatus.OK) & (told["generation"] != request.generations[first:last])
        statuses[ours] = np.where(stale, BlockStatus.STALE, told["status"])
        good = ours[statuses[ours] == BlockStatus.OK]
        where = self._positions[good] - start
        targets = request.targets.addresses[good]
        lengths = np.broadcast_to(request.targets.page_bytes, targets.shape)
        digests = native.copy_blocks(targets, sources[where, None] + self._offsets[None, :], lengths, request.seeds[good])
        statuses[good[digests != rows["checksum"][where]]] = BlockStatus.CORRUPT
