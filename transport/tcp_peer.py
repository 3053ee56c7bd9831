"""One peer of the `tcp` transport: its connections, and the parts of reads that wait for one.

A part runs on a thread of the transport's pool or, cheaper, on the thread that waits for it; at most ``streams`` run at once.
A peer that failed is left alone for `FAILURE_SECONDS`, so that it costs one timeout and not one a read.

Threads: all methods from any thread. A part holds its connection alone.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections import deque

from kvshare import wire
from kvshare.errors import KVShareError, ProtocolError, Unavailable
from kvshare.transport.base import BlockStatus, Transfer
from kvshare.transport.clock import Clock
from kvshare.transport.tcp_protocol import PURPOSE, shut_down, tune
from kvshare.transport.workers import Workers

log = logging.getLogger("kvshare")

FAILURE_SECONDS = 1.0


class Part(ABC):
    """A share of a read, done over one connection."""

    def __init__(self, transfer: Transfer, seconds: float) -> None:
        self.transfer = transfer
        self.seconds = seconds
        self.answered = False  # the peer has said something: the request must not be repeated
        self.held: socket.socket | None = None  # the connection that it was asked on, until it runs
        self._sock: socket.socket | None = None
        self._lock = threading.Lock()

    @abstractmethod
    def ask(self, sock: socket.socket) -> None:
        """Send what can be sent without waiting, so that the peer works while a thread wakes up for the answer. No errors:
        `exchange` will meet them."""

    @abstractmethod
    def exchange(self, sock: socket.socket) -> None:
        """Do it, or what `ask` has left of it. Raises OSError or KVShareError."""

    @abstractmethod
    def restart(self) -> None:
        """What was asked is lost; `exchange` will be called again, with another connection."""

    @abstractmethod
    def finish(self, status: BlockStatus, error: str) -> None:
        """It is over: blocks without an outcome get ``status``. Called once."""

    def run(self, sock: socket.socket) -> None:
        """`exchange`, interruptibly."""
        with self._lock:
            if self.transfer.cancelled:
                raise ConnectionError("cancelled")
            self._sock = sock
        try:
            self.exchange(sock)
        finally:
            with self._lock:
                self._sock = None

    def interrupt(self) -> None:
        """Make a running `exchange` fail."""
        with self._lock:
            if self._sock is not None:
                shut_down(self._sock)


class Peer:
    """See the module's docstring. ``workers`` run parts, ``clock`` ends those that wait too long for a connection."""

    def __init__(self, endpoint: str, secret: str, streams: int, workers: Workers, clock: Clock) -> None:
        self.endpoint = endpoint
        self._secret = secret
        self._streams = streams
        self._workers = workers
        self._clock = clock
        self._lock = threading.Lock()
        self._idle: list[socket.socket] = []
        self._waiting: deque[Part] = deque()
        self._running: set[Part] = set()
        self._using: set[Part] = set()  # those that run and those that hold a connection: at most ``streams``
        self._runners = 0  # calls of _drain that are under way or submitted
        self._failed_until = 0.0
        self._failure = ""
        self._failing = False  # since the last success; then it has been told
        self._closed = False

    def submit(self, part: Part, patient: bool = False) -> None:
        """Take a part; its `Part.finish` is called whatever happens. patient: it may be left until `help` or `wake`, if
        nobody else needs the connection."""
        crowded = False
        with self._lock:
            refused = self._closed
            if not refused:
                if self._idle:
                    part.held = self._idle.pop()
                    part.ask(part.held)
                    self._using.add(part)
                crowded = part.held is None and len(self._waiting) + len(self._running) >= self._streams
                self._waiting.append(part)
                if crowded or not patient:
                    self._call_runner()
        if refused:
            part.finish(BlockStatus.UNREACHABLE, f"{self.endpoint} was forgotten")
        elif crowded:
            self._clock.after(part.seconds, lambda: self.withdraw(part, BlockStatus.TIMEOUT, "no connection became free"))

    def help(self, part: Part) -> None:
        """Run ``part`` on this thread if it still waits and may use a connection."""
        with self._lock:
            if part not in self._waiting or not self._may_run(part):
                return
            self._start(part)
        self._run(part)
        with self._lock:
            self._end(part)
            self._call_runner()

    def wake(self) -> None:
        """Somebody waits for a part without doing it."""
        with self._lock:
            self._call_runner()

    def withdraw(self, part: Part, status: BlockStatus, error: str) -> None:
        """End ``part`` if it still waits."""
        with self._lock:
            if part not in self._waiting:
                return
            self._waiting.remove(part)
            self._end(part)
            self._call_runner()
        if part.held is not None:
            part.held.close()  # an answer is on its way that nobody wants
        part.finish(status, error)

    def close(self, status: BlockStatus, error: str) -> None:
        """End everything; parts that run end by themselves, soon. Idempotent."""
        with self._lock:
            self._closed = True
            idle, waiting, running = self._idle, list(self._waiting), list(self._running)
            self._idle = []
        for sock in idle:
            sock.close()
        for part in running:
            part.interrupt()
        for part in waiting:
            self.withdraw(part, status, error)

    # --- running ------------------------------------------------------------------------------------------------------

    def _may_run(self, part: Part) -> bool:
        return part in self._using or len(self._using) < self._streams

    def _start(self, part: Part) -> None:
        self._waiting.remove(part)
        self._using.add(part)
        self._running.add(part)

    def _end(self, part: Part) -> None:
        self._running.discard(part)
        self._using.discard(part)

    def _call_runner(self) -> None:
        """Locked: see that somebody takes what waits and may run."""
        if self._runners < self._streams and any(map(self._may_run, self._waiting)):
            self._runners += 1
            self._workers.submit(self._drain)

    def _drain(self) -> None:
        while True:
            with self._lock:
                part = next(filter(self._may_run, self._waiting), None)
                if part is None:
                    self._runners -= 1  # whoever uses a connection calls a runner when it ends
                    return
                self._start(part)
            self._run(part)
            with self._lock:
                self._end(part)

    def _run(self, part: Part) -> None:
        status, error = BlockStatus.UNREACHABLE, ""
        try:
            self._exchange(part)
        except TimeoutError as failure:
            status, error = BlockStatus.TIMEOUT, str(failure)
        except (OSError, KVShareError) as failure:
            error = str(failure)
        except Exception as failure:  # a fault of ours must not leave the waiter waiting
            error = f"{type(failure).__name__}: {failure}"
        if part.transfer.cancelled:
            status, error = BlockStatus.CANCELLED, error and "cancelled"
        elif error and not self._closed:
            self._remember(error)
        part.finish(status, f"{self.endpoint}: {error}" if error else "")

    def _exchange(self, part: Part) -> None:
        reused = part.held is not None
        sock, part.held = part.held or self._connect(part.seconds), None
        while True:
            try:
                part.run(sock)
            except (ConnectionError, ProtocolError):
                sock.close()
                # A kept connection may have died unnoticed (its owner restarted): that says nothing of the peer today.
                if not reused or part.answered or part.transfer.cancelled or self._closed:
                    raise
                self._drop_idle()
                part.restart()
                sock, reused = self._connect(part.seconds), False
            except BaseException:
                sock.close()
                raise
            else:
                self._give(sock)
                return

    def _connect(self, seconds: float) -> socket.socket:
        with self._lock:
            if self._idle:
                return self._idle.pop()
            if time.monotonic() < self._failed_until:
                raise Unavailable(f"left alone after a failure: {self._failure}")
        sock = wire.connect_tcp(self.endpoint, self._secret, PURPOSE, seconds)
        tune(sock)
        return sock

    def _give(self, sock: socket.socket) -> None:
        with self._lock:
            self._failing = False
            if not self._closed:
                self._idle.append(sock)
                return
        sock.close()

    def _drop_idle(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for sock in idle:
            sock.close()

    def _remember(self, failure: str) -> None:
        with self._lock:
            if time.monotonic() >= self._failed_until:  # a failure remembered does not prolong itself
                self._failed_until = time.monotonic() + FAILURE_SECONDS
                self._failure = failure
            told, self._failing = self._failing, True
        if not told:
            log.warning("kvshare: peer %s cannot be read, its blocks are misses: %s", self.endpoint, failure)
        self._drop_idle()
