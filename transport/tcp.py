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
from kvshare.transport.tcp_server import DataServer
from kvshare.transport.workers import Workers

if TYPE_CHECKING:
    from kvshare.messages import RegionDescription
    from kvshare.slots import Region

PART_BYTES_MIN = 4 << 20  # less is not worth a second stream
THREADS_MAX = 128  # connections in use at once, over all peers


_encoder = msgspec.msgpack.Encoder()


class _Read:
    """One read: its parts write statuses; the last one to end completes it."""

    def __init__(self, request: ReadRequest, parts: int) -> None:
        self.transfer = Transfer()
        self.statuses = np.full(len(request), BlockStatus.CANCELLED, np.uint8)
        self._block_bytes = request.targets.block_bytes
        self._began = time.monotonic()
        self._left = parts
        self._ok = 0
        self._error = ""
        self._lock = threading.Lock()

    def finished(self, ok: int, error: str) -> None:
        """A part is over; ``ok`` blocks of it are."""
        with self._lock:
            self._ok += ok
            self._error = self._error or error
            self._left -= 1
            if self._left:
                return
        seconds = time.monotonic() - self._began
        self.transfer.complete(Completion(self.statuses, self._ok * self._block_bytes, seconds, self._error))


class _BlocksPart(Part):
    """Blocks ``start`` to ``stop`` of a request, over one connection."""

    def __init__(self, read: _Read, region: int, request: ReadRequest, start: int, stop: int, tamper: Tamper | None) -> None:
        super().__init__(read.transfer, request.seconds)
        self._read = read
        self._region = region
        self._request = request
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
        asked = ReadBlocks(self._region, self._length, self._portion_blocks, slots.tobytes(), generations.tobytes())
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

    Raises:
        ConfigError: it cannot listen there.
    """

    name: ClassVar[str] = "tcp"

    def __init__(self, secret: str, bind: str = "", streams: int = 2, port: int = 0) -> None:
        assert streams >= 1
        self._secret = secret
        self._streams = streams
        # More streams than half the processors only take turns: one stream already uses one on either side.
        self._parts_max = min(streams, max(1, (os.cpu_count() or 1) // 2))
        self._server = DataServer(secret, bind, port) if bind and secret else None
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
        transfer, peer, parts = self._prepare(description, request)
        if peer is None:
            transfer.complete(failed(request, BlockStatus.CANCELLED, "transport tcp is closed"))
            return transfer
        # The bytes of a small read fit into the socket's buffers until somebody takes them.
        patient = len(request) * request.targets.block_bytes < PART_BYTES_MIN
        for part in parts:
            peer.submit(part, patient)
        return transfer

    def _prepare(self, description: RegionDescription, request: ReadRequest) -> tuple[Transfer, Peer | None, list[_BlocksPart]]:
        total = len(request) * request.targets.block_bytes
        count = max(1, min(self._parts_max, len(request), total // PART_BYTES_MIN))
        bounds = [len(request) * i // count for i in range(count + 1)]
        read = _Read(request, count)
        transfer = read.transfer
        peer = self._peer(description, transfer)
        if peer is None:
            return transfer, None, []
        parts = [
            _BlocksPart(read, description.region, request, start, stop, self.tamper)
            for start, stop in itertools.pairwise(bounds)
        ]

        def cancel() -> None:
            for part in parts:
                peer.withdraw(part, BlockStatus.CANCELLED, "cancelled")
                part.interrupt()

        def help_along() -> None:
            for part in parts:
                peer.help(part)

        transfer.on_cancel = cancel
        transfer.help = help_along
        transfer.then(lambda _: self._forget_read(transfer))
        transfer.start = peer.wake
        return transfer, peer, parts

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

    def _forget_read(self, transfer: Transfer) -> None:
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
