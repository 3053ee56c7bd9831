"""A transport that fails on purpose, by a seed: for tests of what is built on transports, ours and yours.

    faulty = FaultyTransport(LoopbackTransport(network), seed=7, corrupt=0.01, lose=0.02, delay_seconds=0.005)

It wraps any transport. Corruption happens below verification: bytes are flipped in the targets after they landed and before
they are checksummed, so that a `CORRUPT` status is earned and never pretended. A lost read says nothing until
``request.seconds`` are over. A death makes all later reads `UNREACHABLE`.

Threads: as the transport within; delayed and lost reads wait on one thread of ours.
"""

from __future__ import annotations

import random
import threading
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from kvshare import native
from kvshare.transport.base import U64, BlockStatus, ReadRequest, Transfer, Transport, failed
from kvshare.transport.clock import Clock

if TYPE_CHECKING:
    from kvshare.places import RegionDescription
    from kvshare.slots import Region


class FaultyTransport(Transport):
    """See the module's docstring.

    Args:
        inner: does the work; closed with us.
        seed: of all decisions; equal seeds and equal calls from one thread give equal faults.
        corrupt: probability that a block gets a flipped bit. lose: that a read is never answered.
        delay_seconds: a read starts after a random time up to this.
        reads_max: the peer dies after so many reads; None: never.
    """

    name: ClassVar[str] = "faulty"

    def __init__(
        self,
        inner: Transport,
        seed: int,
        *,
        corrupt: float = 0.0,
        lose: float = 0.0,
        delay_seconds: float = 0.0,
        reads_max: int | None = None,
    ) -> None:
        self.inner = inner
        self.corrupt, self.lose, self.delay_seconds = corrupt, lose, delay_seconds
        self.reads_left = reads_max
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._clock = Clock("kvshare-faulty-clock")
        self._pending: dict[Transfer, ReadRequest] = {}  # begun here, not yet handed to the inner transport
        self._closed = False
        inner.tamper = self._flip

    def register(self, region: Region) -> None:
        self.inner.register(region)

    def deregister(self, region: Region) -> None:
        self.inner.deregister(region)

    def endpoint(self) -> str:
        return self.inner.endpoint()

    def reaches(self, description: RegionDescription) -> bool:
        return self.inner.reaches(description)

    def read(self, description: RegionDescription, request: ReadRequest) -> Transfer:
        with self._lock:
            dead = self.reads_left == 0
            if self.reads_left:
                self.reads_left -= 1
            lost = self._random.random() < self.lose
            delay_seconds = self._random.random() * self.delay_seconds
            closed = self._closed
        transfer = Transfer()
        if closed:
            transfer.complete(failed(request, BlockStatus.CANCELLED, "transport faulty is closed"))
        elif dead:
            transfer.complete(failed(request, BlockStatus.UNREACHABLE, "the peer died, as it was told to"))
        elif lost or delay_seconds > 0:
            self._postpone(description, request, transfer, lost, delay_seconds)
        else:
            return self.inner.read(description, request)
        return transfer

    def forget(self, node: str) -> None:
        self.inner.forget(node)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            pending = list(self._pending)
        for transfer in pending:
            transfer.cancel()
        self._clock.close()
        self.inner.close()

    # --- faults -------------------------------------------------------------------------------------------------------

    def _postpone(
        self, description: RegionDescription, request: ReadRequest, transfer: Transfer, lost: bool, delay_seconds: float
    ) -> None:
        with self._lock:
            self._pending[transfer] = request
        transfer.on_cancel = lambda: self._give_up(transfer, BlockStatus.CANCELLED, "cancelled")
        if lost:
            self._clock.after(
                request.seconds, lambda: self._give_up(transfer, BlockStatus.TIMEOUT, "lost, as it was told to be")
            )
        else:
            self._clock.after(delay_seconds, lambda: self._start(description, transfer))

    def _give_up(self, transfer: Transfer, status: BlockStatus, error: str) -> None:
        with self._lock:
            request = self._pending.pop(transfer, None)
        if request is not None:
            transfer.complete(failed(request, status, error))

    def _start(self, description: RegionDescription, transfer: Transfer) -> None:
        with self._lock:
            request = self._pending.pop(transfer, None)
        if request is None:
            return
        inner = self.inner.read(description, request)
        transfer.on_cancel = inner.cancel
        if transfer.cancelled:
            inner.cancel()
        inner.then(transfer.complete)

    def _flip(self, addresses: U64, lengths: U64) -> None:
        with self._lock:
            hit = [block for block in range(len(addresses)) if self._random.random() < self.corrupt]
            picks = [self._random.random() for _ in hit]
            bits = [self._random.randrange(8) for _ in hit]
        for block, pick, bit in zip(hit, picks, bits, strict=True):
            at = int(pick * int(lengths[block].sum()))
            ends = np.cumsum(lengths[block])
            page = int(np.searchsorted(ends, at, side="right"))
            offset = at - (int(ends[page]) - int(lengths[block][page]))
            native.view(int(addresses[block][page]) + offset, 1, writable=True)[0] ^= 1 << bit
