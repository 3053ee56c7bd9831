"""The owner's end of `tcp`: sends blocks straight from region memory to whoever proves to know the secret.

    accept ──> handshake ──> (request ──> verdict, portions, trailers)*

Reads take no lock and pin nothing: each portion is sent, then its generations are read, and the reader judges. An answer is one
call into C, without the GIL. What a stranger sends ends its connection and is counted; nothing that it says makes us allocate
more than a request.

Bounds: connections (the one that is idle longest makes room for a new one), the time of a handshake, the bytes of a request and
the time for it to arrive, the time without progress of an answer.

Threads: one accepts, one serves each connection; all of them sleep in the kernel when there is nothing to do.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from kvshare import native, wire
from kvshare.errors import ConfigError, ProtocolError
from kvshare.transport.base import I64, BlockStatus
from kvshare.transport.tcp_protocol import (
    LENGTH,
    PURPOSE,
    REQUEST_BYTES_MAX,
    ReadBlocks,
    receive,
    send,
    shut_down,
    tune,
    verdict_of,
)
from kvshare.transport.tcp_staged import Staged, Stages

if TYPE_CHECKING:
    from kvshare.slots import Region

log = logging.getLogger("kvshare")

SO_MAX_PACING_RATE = 47  # Linux's; Python does not name it. The kernel paces, in bytes/s, whatever the network
ACCEPT_PAUSE_SECONDS = 0.5  # after the system had no descriptor for us

MayRead = Callable[[bytes, str], bool]

_decoder = msgspec.msgpack.Decoder(ReadBlocks)


class _Connection:
    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.idle_since: float | None = None  # None: in a handshake or an answer
        self.serving: Region | None = None  # what is being sent
        self.leaving = False  # shut down to make room, its thread about to end


class DataServer:
    """Serves registered regions on ``bind``:``port`` (0 takes a free port) from its construction to `close`.

    may_read: may a block of this key be sent to a reader with that label? None: any may.

    bytes_per_second: sent over one connection at most, after a first few hundred KB; 0: without limit.

    counters: ``connections``, ``requests``, ``blocks``, ``bytes`` served; ``refused`` (no room), ``strangers`` (failed
    handshakes), ``garbage`` (requests that are none), ``broken`` (connections lost or stuck within an answer), ``barred``
    (blocks that were not sent for the reader's label).

    Raises:
        ConfigError: it cannot listen there.
    """

    def __init__(
        self,
        secret: str,
        bind: str,
        port: int = 0,
        *,
        connections_max: int = 256,
        handshake_seconds: float = wire.HANDSHAKE_SECONDS,
        send_seconds: float = 5.0,
        bytes_per_second: int = 0,
        may_read: MayRead | None = None,
    ) -> None:
        self._secret = secret
        self._may_read = may_read
        self._connections_max = connections_max
        self._handshake_seconds = handshake_seconds
        self._send_seconds = send_seconds
        self._regions: dict[int, Region] = {}
        self._staged: dict[int, Staged] = {}
        self._stages = Stages()
        self._connections: dict[_Connection, threading.Thread] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self.counters: Counter[str] = Counter()
        self._counting = threading.Lock()
        try:
            family = socket.AF_INET6 if ":" in bind else socket.AF_INET
            self._listener = socket.create_server((bind, port), family=family, backlog=128)
        except OSError as error:
            raise ConfigError(f"cannot listen on {bind}:{port}: {error}; set 'bind' to an address of this host.") from error
        tune(self._listener)  # what is accepted inherits it
        if bytes_per_second:
            self._listener.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, bytes_per_second)
        host = f"[{bind}]" if ":" in bind else bind
        self.endpoint = f"{host}:{self._listener.getsockname()[1]}"
        self._acceptor = threading.Thread(target=self._accept, name="kvshare-tcp-accept", daemon=True)
        self._acceptor.start()

    def register(self, region: Region) -> None:
        with self._lock:
            assert region.region not in self._regions
            self._regions[region.region] = region

    def register_staged(self, source: Staged) -> None:
        """Serve a region that is no memory, until we close."""
        with self._lock:
            assert source.region not in self._regions
            self._staged[source.region] = source

    def deregister(self, region: Region) -> None:
        """Answers from it end at once; they hold the mapping until then."""
        with self._lock:
            self._regions.pop(region.region, None)
            for connection in self._connections:
                if connection.serving is region:
                    shut_down(connection.sock)

    def close(self) -> None:
        """End all connections and wait for their threads; idempotent."""
        self._closing.set()
        shut_down(self._listener)  # wakes the acceptor
        self._acceptor.join()
        self._listener.close()
        with self._lock:
            served = dict(self._connections)
            for connection in served:
                shut_down(connection.sock)
        for thread in served.values():
            thread.join()

    def _count(self, **amounts: int) -> None:
        with self._counting:
            self.counters.update(amounts)

    # --- connections --------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                if not self._closing.is_set():
                    log.warning("kvshare: cannot accept a data connection: %s", error)
                    self._closing.wait(ACCEPT_PAUSE_SECONDS)
                continue
            connection = _Connection(sock)
            with self._lock:
                welcome = not self._closing.is_set() and self._make_room()
                if welcome:
                    thread = threading.Thread(target=self._serve, args=(connection,), name="kvshare-tcp-serve", daemon=True)
                    self._connections[connection] = thread
                    thread.start()
            if not welcome:
                self._count(refused=1)
                sock.close()

    def _make_room(self) -> bool:
        """True when there is room for one more connection. An idle one ends for it: its client will connect again."""
        staying = [connection for connection in self._connections if not connection.leaving]
        if len(staying) < self._connections_max:
            return True
        idle = [(connection.idle_since, connection) for connection in staying if connection.idle_since is not None]
        if not idle:
            return False
        _, longest = min(idle, key=lambda entry: entry[0])
        longest.leaving = True
        shut_down(longest.sock)
        return True

    def _serve(self, connection: _Connection) -> None:
        sock = connection.sock
        blame = "strangers"
        try:
            purpose = wire.accept_tcp(sock, self._secret, self._handshake_seconds)
            if purpose != PURPOSE:
                raise ProtocolError(f"a connection for {purpose!r} came to the data port")
            self._count(connections=1)
            blame = "garbage"
            while (request := self._next_request(connection)) is not None:
                blame = "broken"
                self._answer(connection, request)
                blame = "garbage"
        except (ProtocolError, msgspec.MsgspecError, UnicodeDecodeError, OSError) as error:
            if not self._closing.is_set():
                self._count(**{blame: 1})
                log.debug("kvshare: a data connection ended (%s): %s", blame, error)
        except Exception:
            self._count(broken=1)
            log.exception("kvshare: a data connection ended by a fault of ours")
        finally:
            with self._lock:
                del self._connections[connection]
                sock.close()

    def _next_request(self, connection: _Connection) -> ReadBlocks | None:
        """The next request, however long it takes to begin; None when the other side has gone."""
        sock = connection.sock
        connection.idle_since = time.monotonic()
        data = sock.recv(LENGTH.size + REQUEST_BYTES_MAX)
        connection.idle_since = None
        if not data:
            return None
        if len(data) < LENGTH.size:
            data += receive(sock, LENGTH.size - len(data), self._handshake_seconds)
        (length,) = LENGTH.unpack_from(data)
        missing = LENGTH.size + length - len(data)
        if length > REQUEST_BYTES_MAX or missing < 0:
            raise ProtocolError(f"a request of {length} bytes, of at most {REQUEST_BYTES_MAX}, or one too early")
        if missing:
            data += receive(sock, missing, self._handshake_seconds)
        return _decoder.decode(memoryview(data)[LENGTH.size :])

    # --- answers ------------------------------------------------------------------------------------------------------

    def _answer(self, connection: _Connection, request: ReadBlocks) -> None:
        fits = len(request.slots) % 8 == 0 and len(request.slots) == len(request.generations)
        if not fits or not 0 < request.portion_blocks < 1 << 31 or request.length >= 1 << 63:
            raise ProtocolError("a request that does not fit together")
        slots, generations = np.frombuffer(request.slots, np.int64), np.frombuffer(request.generations, np.uint64)
        with self._lock:
            region = connection.serving = self._regions.get(request.region)
            staged = self._staged.get(request.region)
        source = staged or region
        if source is not None and self._may_read is not None:
            slots, barred = _permitted(source, slots, lambda key: self._may_read(key, request.label))  # type: ignore[misc]
            self._count(barred=barred)
            if barred and barred == len(slots):
                region = staged = None
        if staged is not None and 0 < request.length <= staged.slot_bytes:
            how = (request.length, request.portion_blocks)
            blocks = self._stages.answer(connection.sock, self._send_seconds, staged, (slots, generations), *how)
            self._count(requests=1, blocks=blocks, bytes=blocks * request.length)
            return
        if region is None or request.length < 1:
            send(connection.sock, verdict_of(bytes([BlockStatus.UNREACHABLE]) * len(slots)), self._send_seconds)
            return
        blocks = native.send_slots(
            connection.sock.fileno(),
            self._send_seconds,
            (region.table_address, region.data_address),
            region.slot_bytes,
            region.available_slots,
            slots,
            generations,
            request.length,
            request.portion_blocks,
        )
        connection.serving = None
        self._count(requests=1, blocks=blocks, bytes=blocks * request.length)


def _permitted(source: Region | Staged, slots: I64, may_read: Callable[[bytes], bool]) -> tuple[I64, int]:
    """``slots``, with -1 (there is no such slot) in place of those whose block may not be read, and how many those are.

    What is in a slot may change right afterwards: then its generation does too, and it is not the one that was asked for.
    """
    permitted, barred = slots.copy(), 0
    for i in np.flatnonzero((slots >= 0) & (slots < source.available_slots)).tolist():
        if not may_read(source.key(int(slots[i]))):
            permitted[i] = -1
            barred += 1
    return permitted, barred
