"""Reads done in portions by a few threads: what transports share whose reader moves the bytes itself.

    read ──> portions of a few MiB ──> the pool's threads and whoever waits take one after the other

Threads: a read's portions are done by any of the pool's threads and by the thread that waits for it, several at once; the
last one to end completes the transfer, so nothing writes to its targets any more.
"""

from __future__ import annotations

import threading
import time
from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

from kvshare.errors import KVShareError
from kvshare.transport.base import BlockStatus, Completion, ReadRequest, Transfer, Transport, failed
from kvshare.transport.workers import Workers

if TYPE_CHECKING:
    from kvshare.places import RegionDescription

U8 = npt.NDArray[np.uint8]


class _Read:
    """One read: portions that the pool's threads, and whoever waits, take until none is left."""

    def __init__(self, transport: PortionTransport, description: RegionDescription, request: ReadRequest) -> None:
        self.transfer = Transfer()
        self.transfer.help = self.run
        self.transfer.on_cancel = self.transfer.start = lambda: transport.wake(self)
        self._transport, self._description, self._request = transport, description, request
        self._block_bytes = request.targets.block_bytes
        self._statuses = np.full(len(request), BlockStatus.CANCELLED, np.uint8)
        self._began = time.monotonic()
        self._lock = threading.Lock()
        step = transport.portion_blocks(len(request), self._block_bytes)
        self._portions = [(start, min(start + step, len(request))) for start in range(0, len(request), step)] or [(0, 0)]
        self._left = len(self._portions)
        self._ok = 0
        self._portions.reverse()  # taken from the end
        self._error = ""

    @property
    def portions(self) -> int:
        return self._left

    def run(self) -> None:
        """Do portions until all are taken. Any thread, several at once."""
        while True:
            with self._lock:
                if not self._portions:
                    return
                start, stop = self._portions.pop()
            ok, error = 0, "cancelled"
            if not self.transfer.cancelled:
                ok, error = self._read(start, stop)
            with self._lock:
                self._ok += ok
                self._error = self._error or error
                self._left -= 1
                last = self._left == 0
            if last:
                self._complete()

    def _read(self, start: int, stop: int) -> tuple[int, str]:
        """How many blocks are OK, and why others are not."""
        try:
            ok = self._transport.read_portion(self._description, self._request, self._statuses, start, stop)
            return ok, "" if ok == stop - start else "stale or corrupt blocks"
        except (OSError, KVShareError) as failure:
            error = str(failure)
        except Exception as failure:  # a fault of ours must not leave the waiter waiting
            error = f"{type(failure).__name__}: {failure}"
        self._statuses[start:stop] = BlockStatus.UNREACHABLE
        return 0, error

    def _complete(self) -> None:
        seconds = time.monotonic() - self._began
        self._transport.finished(self)
        self.transfer.complete(Completion(self._statuses, self._ok * self._block_bytes, seconds, self._error))


class PortionTransport(Transport):
    """A transport whose reads are done by a few threads of its own and by whoever waits for them. An implementor says how one
    portion is read."""

    portion_bytes_min: ClassVar[int] = 4 << 20  # handing less to another thread costs more than it brings
    portion_bytes_max: ClassVar[int] = 8 << 20  # a cancelled read ends after at most this much

    def __init__(self, threads: int) -> None:
        assert threads >= 1
        self._threads = threads
        self._pool = Workers(f"kvshare-{self.name}", threads)
        self._running: set[_Read] = set()
        self._running_lock = threading.Lock()
        self._closed = False

    @abstractmethod
    def read_portion(self, description: RegionDescription, request: ReadRequest, statuses: U8, start: int, stop: int) -> int:
        """Read blocks ``start`` to ``stop``, write their ``statuses`` (uint8, of the whole request), return how many are OK.
        Any thread, several at once. Does not wait for the peer.

        Raises:
            OSError, KVShareError: all of them are unreachable, for this reason.
        """

    def portion_blocks(self, blocks: int, block_bytes: int) -> int:
        """How many blocks of a read are one portion."""
        share = blocks * block_bytes // (2 * self._threads)
        portion_bytes = min(max(share, self.portion_bytes_min), self.portion_bytes_max)
        return max(1, portion_bytes // max(1, block_bytes))

    def read(self, description: RegionDescription, request: ReadRequest) -> Transfer:
        running = _Read(self, description, request)
        with self._running_lock:
            closed = self._closed
            if not closed:
                self._running.add(running)
        if not closed and running.portions > 1:
            for _ in range(min(self._threads, running.portions)):
                self._pool.submit(running.run)
        if closed:
            running.transfer.complete(failed(request, BlockStatus.CANCELLED, f"transport {self.name} is closed"))
        return running.transfer

    def wake(self, read: _Read) -> None:
        """For reads: somebody waits for this one without doing it."""
        if read.portions == 1:
            self._pool.submit(read.run)

    def finished(self, read: _Read) -> None:
        """For reads: this one is complete."""
        with self._running_lock:
            self._running.discard(read)

    def close(self) -> None:
        with self._running_lock:
            self._closed = True
            running = list(self._running)
        for read in running:
            read.transfer.cancel()
            read.run()  # which only completes it, unless a thread is at it
        self._pool.close()
