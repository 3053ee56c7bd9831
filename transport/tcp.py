"""Reads over authenticated TCP: straight from the owner's region into the reader's targets.

    read ──> parts, one a stream ──> `Peer` (connections) ──> request ──> verdict, portions, trailers ──> judge

An answer is received by one call into C, without the GIL: bytes land in the targets by `recvmsg` and are checksummed piece by
piece while they are in the cache. `tcp_protocol` has the layout, `tcp_server` the other end, `tcp_peer` the connections.

Cancelling shuts the connection down, which is a fence: nothing can arrive any more. A peer that hangs, dies or answers with
anything unexpected ends its parts, at the latest after ``request.seconds`` without progress; the connection is dropped, and the
next read makes a new one.

Threads: parts run in a pool, whose threads are made as needed, and on waiting threads.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import threading
import time
from typing import TYPE_CHECKING, ClassVar

import msgspec
import numpy as np

from kvshare import native
from kvshare.errors import ProtocolError
from kvshare.transport.base import BlockStatus, Completion, ReadRequest, Tamper, Transfer, Transport, failed
from kvshare.transport.clock import Clock
from kvshare.transport.mapped import verify_again, wanted_of
from kvshare.transport.tcp_peer import Part, Peer
from kvshare.transport.tcp_protocol import (
    BLOCKS_MAX,
    LENGTH,
    PORTION_BYTES,
    ReadBlocks,
    send,
)
from kvshare.transport.tcp_server import DataServer, MayRead
from kvshare.transport.workers import Workers

if TYPE_CHECKING:
    from kvshare.places import RegionDescription
    from kvshare.slots import Region
    from kvshare.transport.tcp_staged import Staged

PART_BYTES_MIN = 4 << 20  # less is not worth a second stream
THREADS_MAX = 128  # connections in use at once, over all peers


_encoder = msgspec.msgpack.Encoder()


class _Read:
    """One read: its parts write statuses; the last one to end completes it."""

    def __init__(self, transport: TcpTransport, request: ReadRequest) -> None:
        self.request = request
        self.transfer = Transfer()
        self.statuses = np.empty(len(request), np.uint8)
        self.statuses.fill(BlockStatus.CANCELLED)
        self.parts: list[_BlocksPart] = []
        self.peer: Peer | None = None
        self._transport = transport
        self.label = transport.label
        self._began = time.monotonic()
        self._ended = 0
        self._ok = 0
        self._error = ""
        self._lock = threading.Lock()

    def start(self, peer: Peer, region: int, bounds: list[int]) -> None:
        """Hand the blocks between successive ``bounds`` to ``peer``, a part for each."""
        tamper = self._transport.tamper
        self.peer = peer
        self.parts = [_BlocksPart(self, region, start, stop, tamper) for start, stop in itertools.pairwise(bounds)]
        self.transfer.on_cancel = self._cancel
        self.transfer.help = self._help
        self.transfer.start = peer.wake
        # The bytes of a small read fit into the socket's buffers until somebody takes them.
        patient = len(self.request) * self.request.targets.block_bytes < PART_BYTES_MIN
        for part in self.parts:
            peer.submit(part, patient)

    def finished(self, ok: int, error: str) -> None:
        """A part is over; ``ok`` blocks of it are."""
        with self._lock:
            self._ok += ok
            self._error = self._error or error
            self._ended += 1
            if self._ended < len(self.parts):
                return
        self._transport.finished(self.transfer)
        moved = self._ok * self.request.targets.block_bytes
        self.transfer.complete(Completion(self.statuses, moved, time.monotonic() - self._began, self._error))

    def _cancel(self) -> None:
        assert self.peer is not None
        for part in self.parts:
            self.peer.withdraw(part, BlockStatus.CANCELLED, "cancelled")
            part.interrupt()

    def _help(self) -> None:
        assert self.peer is not None
        for part in self.parts:
            self.peer.help(part)


class _BlocksPart(Part):
    """Blocks ``start`` to ``stop`` of a request, over one connection."""

    def __init__(self, read: _Read, region: int, start: int, stop: int, tamper: Tamper | None) -> None:
        super().__init__(read.transfer, read.request.seconds)
        self._read = read
        self._region = region
        self._request = request = read.request
        self._start, self._stop = start, stop
        self._done = start  # blocks before it were answered for
        self._ok = 0
        self._tamper = tamper
        self._length = request.targets.block_bytes
        self._portion_blocks = max(1, PORTION_BYTES // max(1, self._length))
        self._unsent: bytes | None = None  # rest of a request that was begun by `ask`

    def ask(self, sock: socket.socket) -> None:
        frame = self._frame(self._start, min(self._start + BLOCKS_MAX, self._stop))
        sent = 0
        with contextlib.suppress(OSError):
            sent = sock.send(frame, socket.MSG_DONTWAIT)
        self._unsent = frame[sent:]

    def exchange(self, sock: socket.socket) -> None:
        while self._done < self._stop:
            end = min(self._done + BLOCKS_MAX, self._stop)
            frame = self._frame(self._done, end) if self._unsent is None else self._unsent
            self._unsent = None
            if frame:
                send(sock, frame, self.seconds)
            self._receive(sock, self._done, end)
            self._done = end

    def restart(self) -> None:
        self._unsent = None

    def finish(self, status: BlockStatus, error: str) -> None:
        ours = slice(self._start, self._stop)
        if error:
            statuses = self._read.statuses[ours]
            statuses[statuses == BlockStatus.CANCELLED] = status
        elif self._ok < self._stop - self._start:
            error = "stale, corrupt or unknown blocks"
        self._read.finished(self._ok, error)

    def _frame(self, start: int, stop: int) -> bytes:
        request = self._request
        slots, generations = request.slots[start:stop], request.generations[start:stop]
        asked = ReadBlocks(
            self._region, self._length, self._portion_blocks, slots.tobytes(), generations.tobytes(), self._read.label
        )
        encoded = _encoder.encode(asked)
        return LENGTH.pack(len(encoded)) + encoded

    def _receive(self, sock: socket.socket, start: int, stop: int) -> None:
        wanted = wanted_of(self._request, self._read.statuses, start, stop)
        try:
            ok = native.recv_slots(sock.fileno(), self.seconds, self._portion_blocks, wanted)
            self.answered = True
        except ValueError as error:
            raise ProtocolError(str(error)) from error
        except OSError:
            known = wanted.statuses != BlockStatus.CANCELLED
            self.answered = self.answered or bool(known.any())
            self._ok += self._verified(wanted, int(np.count_nonzero(wanted.statuses == BlockStatus.OK)))
            raise
        self._ok += self._verified(wanted, ok)

    def _verified(self, wanted: native.Wanted, ok: int) -> int:
        if self._tamper is None and self._length >= native.FUSED_BYTES_MIN:
            return ok
        return verify_again(wanted, self._tamper)


class TcpTransport(Transport):
    """See the module's docstring.

    Args:
        secret: the cluster's; without one nothing is reached and nothing listens.
        bind: address to serve on, which is also the one that peers are told; empty to only read.
        streams: connections to one peer.
        port: to serve on; 0 takes a free one.
        bytes_per_second: what it sends over one connection at most; 0: without limit.
        label: where we stand (setting 'region'), told to those that we read from.
        may_read: may a block of this key be sent to a reader with that label? None: any may.

    Raises:
        ConfigError: it cannot listen there.
    """

    name: ClassVar[str] = "tcp"

    def __init__(
        self,
        secret: str,
        bind: str = "",
        streams: int = 2,
        port: int = 0,
        bytes_per_second: int = 0,
        label: str = "",
        may_read: MayRead | None = None,
    ) -> None:
        assert streams >= 1
        self.label = label
        self._secret = secret
        self._streams = streams
        # More streams than half the processors only take turns: one stream already uses one on either side.
        self._parts_max = min(streams, max(1, (os.cpu_count() or 1) // 2))
        self._server: DataServer | None = None
        if bind and secret:
            self._server = DataServer(secret, bind, port, bytes_per_second=bytes_per_second, may_read=may_read)
        self._pool = Workers("kvshare-tcp-read", THREADS_MAX)
        self._clock = Clock("kvshare-tcp-clock")
        self._peers: dict[str, Peer] = {}  # by node
        self._reads: set[Transfer] = set()
        self._lock = threading.Lock()
        self._closed = False

    # --- serving ------------------------------------------------------------------------------------------------------

    def register(self, region: Region) -> None:
        if self._server is not None:
            self._server.register(region)

    def register_staged(self, source: Staged) -> None:
        """Serve a region that is no memory, until we close."""
        if self._server is not None:
            self._server.register_staged(source)

    def deregister(self, region: Region) -> None:
        if self._server is not None:
            self._server.deregister(region)

    def endpoint(self) -> str:
        return self._server.endpoint if self._server is not None else ""

    def counters(self) -> dict[str, int]:
        """What the server counted; see `DataServer`."""
        return dict(self._server.counters) if self._server is not None else {}

    # --- reading ------------------------------------------------------------------------------------------------------

    def reaches(self, description: RegionDescription) -> bool:
        return bool(self._secret and description.endpoint)

    def read(self, description: RegionDescription, request: ReadRequest) -> Transfer:
        read = _Read(self, request)
        peer = self._peer(description, read.transfer)
        if peer is None:
            read.transfer.complete(failed(request, BlockStatus.CANCELLED, "transport tcp is closed"))
            return read.transfer
        count = len(request)
        parts = max(1, min(self._parts_max, count, count * request.targets.block_bytes // PART_BYTES_MIN))
        read.start(peer, description.region, [count * i // parts for i in range(parts + 1)])
        return read.transfer

    def _peer(self, description: RegionDescription, transfer: Transfer) -> Peer | None:
        """The peer of a region, with ``transfer`` among the running reads; None when closed."""
        replaced = None
        with self._lock:
            if self._closed:
                return None
            self._reads.add(transfer)
            peer = self._peers.get(description.node)
            if peer is None or peer.endpoint != description.endpoint:
                replaced = peer
                peer = Peer(description.endpoint, self._secret, self._streams, self._pool, self._clock)
                self._peers[description.node] = peer
        if replaced is not None:
            replaced.close(BlockStatus.UNREACHABLE, "it moved to another endpoint")
        return peer

    def finished(self, transfer: Transfer) -> None:
        """For reads: this one is about to complete."""
        with self._lock:
            self._reads.discard(transfer)

    def forget(self, node: str) -> None:
        with self._lock:
            peer = self._peers.pop(node, None)
        if peer is not None:
            peer.close(BlockStatus.UNREACHABLE, f"node {node!r} was forgotten")

    def close(self) -> None:
        """End everything; idempotent. Not to be called by a transfer's callback."""
        with self._lock:
            self._closed = True
            peers, reads = list(self._peers.values()), list(self._reads)
            self._peers.clear()
        for transfer in reads:
            transfer.cancel()
        for peer in peers:
            peer.close(BlockStatus.CANCELLED, "transport tcp is closed")
        self._pool.close()
        self._clock.close()
        if self._server is not None:
            self._server.close()
