"""A client's connection to its node's Unix socket: one thread, no polling, never a blocking send.

`send` hands over as much as the kernel takes at once; the rest waits in a bounded outbox for the I/O thread. A node that
does not read (stopped, hung) fills the outbox and is treated as gone: the connection is dropped, callers get misses.

Threads: `send` and `ask` from any thread; `on_message` and `on_lost` are called in the I/O thread.
"""

from __future__ import annotations

import itertools
import selectors
import socket
import struct
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import msgspec

from kvshare.errors import ProtocolError, Unavailable
from kvshare.messages import (
    Attached,
    Done,
    Drained,
    Dropped,
    Fetching,
    Indexed,
    Located,
    Message,
    NodeStatus,
    PeerLost,
    Purged,
    Refused,
    Reserved,
    ToSession,
    Warm,
    Withdraw,
)

OUTBOX_BYTES_MAX = 16 << 20
_LENGTH = struct.Struct("<I")
_RECEIVE_BYTES = 1 << 18

Pushed = Indexed | Dropped | PeerLost | Fetching | Withdraw
Answer = Attached | Located | Reserved | Done | Refused | Warm | NodeStatus | Purged | Drained


class Channel:
    """See the module's docstring. Raises Unavailable when nobody listens at ``path``."""

    def __init__(
        self,
        path: str,
        bytes_max: int,
        on_message: Callable[[Pushed], None],
        on_lost: Callable[[str], None],
        seconds: float = 1.0,
    ) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(seconds)
            self._socket.connect(path)
        except OSError as error:
            self._socket.close()
            raise Unavailable(f"no node listens at {path}: {error}") from error
        self._socket.setblocking(False)
        self._bytes_max = bytes_max
        self._on_message = on_message
        self._on_lost = on_lost
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(ToSession)
        self._encoder = msgspec.msgpack.Encoder()
        self._asks = itertools.count(1)
        self._pending: dict[int, Future[Answer]] = {}
        self._outbox = bytearray()
        self._lock = threading.Lock()
        self._lost: str | None = None
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="kvshare-channel", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._lost is None

    def send(self, message: Message) -> bool:
        """Send without waiting. False when the connection is gone."""
        payload = self._encoder.encode(message)
        return self._send(_LENGTH.pack(len(payload)) + payload)

    def ask(self, make: Callable[[int], Message]) -> Future[Answer]:
        """Send a question; the future gets its answer, or Unavailable when the connection is lost first."""
        number = next(self._asks)
        future: Future[Answer] = Future()
        with self._lock:
            lost = self._lost
            if lost is None:
                self._pending[number] = future
        if lost is not None:
            future.set_exception(Unavailable(lost))
            return future
        self.send(make(number))
        return future

    def close(self, reason: str = "closed by us") -> None:
        """Drop the connection; idempotent. Pending questions fail."""
        self._lose(reason)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=5.0)

    def _send(self, data: bytes) -> bool:
        with self._lock:
            if self._lost is not None:
                return False
            if not self._outbox:
                try:
                    sent = self._socket.send(data)
                except BlockingIOError:
                    sent = 0
                except OSError as error:
                    sent, data = 0, b""
                    self._wake(f"the node's connection broke: {error}")
                if sent == len(data):
                    return True
                data = data[sent:]
            self._outbox += data
            if len(self._outbox) > OUTBOX_BYTES_MAX:
                self._wake("the node does not read what we send")
                return False
            self._wake()
        return True

    def _wake(self, lost: str | None = None) -> None:
        """With the lock held: have the I/O thread look again (and give up when ``lost`` says why)."""
        if lost is not None and self._lost is None:
            self._lost = lost
        try:
            self._wake_writer.send(b"\0")
        except BlockingIOError:
            pass  # already woken
        except OSError:
            pass  # the I/O thread has ended

    def _lose(self, reason: str) -> None:
        with self._lock:
            self._wake(reason)

    def _run(self) -> None:
        inbox = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            selector.register(self._wake_reader, selectors.EVENT_READ)
            try:
                while self._lost is None:
                    self._turn(selector, inbox)
            except (OSError, ProtocolError, msgspec.MsgspecError, UnicodeDecodeError) as error:
                self._lose(f"the node's connection broke: {error}")
        with self._lock:
            assert self._lost is not None
            reason = self._lost
            pending, self._pending = list(self._pending.values()), {}
            self._socket.close()
            self._wake_reader.close()
            self._wake_writer.close()
        for future in pending:
            future.set_exception(Unavailable(reason))
        self._on_lost(reason)

    def _turn(self, selector: selectors.BaseSelector, inbox: bytearray) -> None:
        with self._lock:
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._outbox else 0)
        selector.modify(self._socket, wanted)
        for key, events in selector.select():
            if key.fileobj is self._wake_reader:
                self._wake_reader.recv(4096)
                continue
            if events & selectors.EVENT_WRITE:
                with self._lock:
                    sent = self._socket.send(memoryview(self._outbox)[: 1 << 20])
                    del self._outbox[:sent]
            if events & selectors.EVENT_READ:
                data = self._socket.recv(_RECEIVE_BYTES)
                if not data:
                    raise ProtocolError("the node closed the connection")
                inbox += data
                self._dispatch(inbox)

    def _dispatch(self, inbox: bytearray) -> None:
        start = 0
        while len(inbox) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(inbox, start)
            if length > self._bytes_max:
                raise ProtocolError(f"a frame of {length} bytes is over the limit of {self._bytes_max}")
            end = start + _LENGTH.size + length
            if len(inbox) < end:
                break
            with memoryview(inbox)[start + _LENGTH.size : end] as frame:
                message = self._decoder.decode(frame)
            start = end
            if isinstance(message, Pushed):
                self._on_message(message)
            else:
                future = self._pending.pop(message.ask, None)
                if future is not None:
                    future.set_result(message)
        del inbox[:start]
