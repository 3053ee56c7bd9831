"""One load: a plan's blocks into memory, from all its sources at once, for as long as that pays.

What computing these blocks would take is the plan's ``seconds``. Blocks that have arrived have saved their share of it; a load
may have taken that much, and ``grace_seconds``, at any moment: else it ends and the engine computes the rest, having lost no
more than the grace. So that it can end between blocks, a source that looks slow is read in batches, each of which should take
half of what may still be spent; a fast one is read in one.

    advance ──> a read for each source ──> _arrived ──> (Reader.resume) ──> advance ──> ... ──> complete

Plans that say nothing of seconds, and what our own node holds, are read in one batch and without a limit.

Threads: `advance` runs in the mover's load thread, `_arrived` in those of the transports, the rest anywhere.
"""

from __future__ import annotations

import math
import threading
import time
from functools import partial
from typing import Protocol

import numpy as np

from kvshare import keys
from kvshare.loading import LoadPlan, Measured, Source, SourceRead
from kvshare.places import RegionDescription
from kvshare.transport.base import I64, BlockStatus, Completion, ReadRequest, Targets, Transfer

FIRST_BYTES = 1 << 20  # of a source that has not been measured: enough to measure it


class Reader(Protocol):
    """What a load needs of its mover. All methods from any thread."""

    def read(self, description: RegionDescription, request: ReadRequest) -> Transfer: ...

    def is_own(self, description: RegionDescription) -> bool:
        """A region of our own node, whose mapping we hold?"""

    def rate(self, source: Source) -> float:
        """Bytes per second that a read may expect, 0 where unknown."""

    def began(self, source: Source) -> None:
        """A read begins."""

    def ended(self, source: Source, moved: int) -> None:
        """It has ended, with ``moved`` bytes of good blocks."""

    def gave_up(self, measured: Measured) -> None:
        """A source has turned out too slow."""

    def corrupt(self, read: SourceRead, blocks: I64) -> None:
        """These of the read's blocks failed their checksum."""

    def missed(self, keys: list[bytes]) -> None:
        """Peers did not have these, or could not be read."""

    def resume(self, pull: Pull) -> None:
        """Call `Pull.advance` soon."""


class _Stream:
    """One source's part of a load. Blocks before ``next`` are done or under way; ``transfer`` while a batch is."""

    def __init__(self, read: SourceRead, request: ReadRequest, own: bool) -> None:
        self.read = read
        self.request = request
        self.own = own
        self.next = 0
        self.running = False
        self.transfer: Transfer | None = None
        self.began = 0.0
        self.moved = 0

    @property
    def left(self) -> int:
        return len(self.request) - self.next

    def batch(self, blocks: int) -> ReadRequest:
        whole, part = self.request, slice(self.next, self.next + blocks)
        targets = Targets(whole.targets.addresses[part], whole.targets.page_bytes)
        return ReadRequest(whole.slots[part], whole.generations[part], whole.seeds[part], targets, whole.seconds)


class Pull(Transfer):
    """See the module's docstring. ``progress_seconds``: longest time of a read without progress."""

    def __init__(self, plan: LoadPlan, targets: Targets, progress_seconds: float, reader: Reader) -> None:
        super().__init__()
        self.statuses = np.full(len(plan), BlockStatus.UNREACHABLE, np.uint8)
        self._plan = plan
        self._targets = targets
        self._progress_seconds = progress_seconds
        self._reader = reader
        self._began = time.monotonic()
        self._streams: list[_Stream] = []
        self._prepared = False
        self._arrived_blocks = 0  # leading ones
        self._moved = 0
        self._errors: list[str] = []
        self._state = threading.Lock()
        self._stopped = self._late = self._finished = False

    @property
    def limited(self) -> bool:
        """It has to pay, and has not been told to end."""
        return self._plan.seconds > 0 and not self._stopped and not self._finished

    @property
    def deadline(self) -> float:
        """When it does not pay any more, unless something arrives until then (`time.monotonic`)."""
        if not self._plan.seconds:
            return math.inf
        saved = self._plan.seconds * self._arrived_blocks / max(1, len(self._plan))
        return self._began + self._plan.grace_seconds + saved

    def advance(self) -> None:
        """Begin what is to be read now, or end what does not pay any more."""
        if not self._prepared:
            try:
                self._prepare()
            except Exception as error:  # of whoever made the plan: nothing writes to the targets yet
                self._errors.append(f"{type(error).__name__}: {error}")
                self._streams = []
        left = self.deadline - time.monotonic()
        if left <= 0:
            self._stop(late=True)
        for stream in self._streams:
            self._begin(stream, left)
        self._finish()

    def cancel(self) -> None:
        super().cancel()
        self._stop(late=False)
        self._finish()

    def _prepare(self) -> None:
        """All requests before the first read: what can go wrong must do so while nothing writes to the targets yet."""
        self._prepared = True
        seeds = np.array(keys.seeds_of(self._plan.keys), np.uint64)
        streams = []
        for read in self._plan.reads:
            targets = Targets(self._targets.addresses[read.positions], self._targets.page_bytes)
            request = ReadRequest(read.slots, read.generations, seeds[read.positions], targets, self._progress_seconds)
            streams.append(_Stream(read, request, self._reader.is_own(read.description)))
        if not streams:
            self._errors.append("no source")
        with self._state:
            self._streams = streams

    def _begin(self, stream: _Stream, seconds: float) -> None:
        """The next batch of a source, if none is under way. ``seconds``: what may be spent."""
        with self._state:
            if stream.running or self._stopped or not stream.left:
                return
            blocks = self._batch_blocks(stream, seconds)
            request = stream.batch(blocks)
            first = stream.next
            stream.next += blocks
            stream.running = True
            stream.began = stream.began or time.monotonic()
        self._reader.began(stream.read.source)
        transfer = self._reader.read(stream.read.description, request)
        with self._state:
            stream.transfer = transfer
            unwanted = self._stopped
        if unwanted:
            transfer.cancel()
        transfer.then(partial(self._arrived, stream, first, blocks))

    def _batch_blocks(self, stream: _Stream, seconds: float) -> int:
        if stream.own or math.isinf(seconds):
            return stream.left
        rate = self._reader.rate(stream.read.source)
        fitting = (rate * seconds / 2 if rate else FIRST_BYTES) // self._targets.block_bytes
        return stream.left if 2 * fitting >= stream.left else max(1, int(fitting))

    def _arrived(self, stream: _Stream, first: int, blocks: int, completion: Completion) -> None:
        source, statuses = stream.read.source, completion.statuses
        positions = stream.read.positions[first : first + blocks]
        gone = bool(np.isin(statuses, (BlockStatus.UNREACHABLE, BlockStatus.TIMEOUT)).any())
        with self._state:
            self.statuses[positions] = statuses
            self._arrived_blocks = int(np.argmax(self.statuses != 0)) if self.statuses.any() else len(self.statuses)
            self._moved += completion.bytes
            stream.moved += completion.bytes
            if completion.error:
                self._errors.append(f"{stream.read.description.node}: {completion.error}")
            stream.running, stream.transfer = False, None
            if gone or self._stopped:
                self._drop(stream, int(statuses[statuses != 0][0]) if gone else BlockStatus.CANCELLED)
            slow = bool((statuses == BlockStatus.TIMEOUT).any()) or (self._late and not stream.own and not completion.ok)
        self._reader.ended(source, completion.bytes)
        if slow:
            self._reader.gave_up(Measured(source, stream.moved, time.monotonic() - stream.began, slow=True))
        corrupt = np.flatnonzero(statuses == BlockStatus.CORRUPT)
        if len(corrupt):
            self._reader.corrupt(stream.read, first + corrupt)
        bad = [] if stream.own else positions[(statuses != BlockStatus.OK) & (statuses != BlockStatus.CANCELLED)].tolist()
        if bad:
            self._reader.missed([self._plan.prefix + self._plan.hashes[position] for position in bad])
        if stream.left:
            self._reader.resume(self)
        else:
            self._finish()

    def _stop(self, late: bool) -> None:
        """Begin nothing more and interrupt what is under way; our own node's memory is never late."""
        with self._state:
            if self._finished or self._stopped:
                return
            self._stopped, self._late = True, late
            if late:
                self._errors.append("pulling became slower than computing")
            for stream in self._streams:
                if not stream.running:
                    self._drop(stream, BlockStatus.CANCELLED)
            if not self._prepared:
                self._prepared = True
                self.statuses[:] = BlockStatus.CANCELLED
            running = [stream.transfer for stream in self._streams if stream.transfer and not (late and stream.own)]
        for transfer in running:
            transfer.cancel()

    def _drop(self, stream: _Stream, status: int) -> None:
        """Locked: what has not been asked for never will be."""
        self.statuses[stream.read.positions[stream.next :]] = status
        stream.next = len(stream.request)

    def _finish(self) -> None:
        """Complete it when nothing is under way and nothing is left."""
        with self._state:
            if self._finished or not self._prepared or any(stream.running or stream.left for stream in self._streams):
                return
            self._finished = True
        seconds = time.monotonic() - self._began
        self.complete(Completion(self.statuses, self._moved, seconds, "; ".join(dict.fromkeys(self._errors))))
