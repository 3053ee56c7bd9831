"""Blocking work of a tier that may not answer: a few threads, and a patience that ends.

    run(work) ──> a thread: work() ──> its result
                     │ takes longer than ``seconds``
                     └──> the tier is away: whoever waits gets Unavailable, whoever comes too, until that work has ended

A device that does not answer cannot be interrupted. Its thread stays with it, and what the work may write to stays out of use
until ``late`` says that the work is over. Said once when a tier goes away and once when it is back.

Threads: all methods from any thread, `run` on a loop; work runs in threads of ours, which do not keep the process alive.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from kvshare.errors import Unavailable
from kvshare.transport.workers import Workers

log = logging.getLogger("kvshare")

T = TypeVar("T")

CLOSE_SECONDS = 2.0  # for work under way when we end; whatever takes longer is left behind


class _Operation(Generic[T]):
    """``began``: when a thread took it up, 0 before."""

    def __init__(self, work: Callable[[], T]) -> None:
        self.work: Callable[[], T] | None = work
        self.future: Future[T] = Future()
        self.began = 0.0


class Blocking:
    """See the module's docstring. ``name``: of the tier, for people; ``setting``: that says how long we wait for it."""

    def __init__(self, name: str, setting: str, threads: int, seconds: float) -> None:
        self._name = name
        self._setting = setting
        self._seconds = seconds
        self._workers = Workers(f"kvshare-{name.replace(' ', '-')}", threads)
        self._running: set[_Operation[object]] = set()
        self._lock = threading.Lock()
        self._said = False
        self._closed = False

    @property
    def away(self) -> bool:
        """Does it not answer at present?"""
        away = self.lag() >= self._seconds
        if away and not self._said:
            self._said = True
            log.warning(
                "kvshare: the %s has not answered for %.1f s (setting '%s'): it is left alone until it does; its blocks are "
                "misses meanwhile",
                self._name,
                self.lag(),
                self._setting,
            )
        return away

    def lag(self) -> float:
        """For how long the oldest work under way has been so, in seconds; 0 when there is none."""
        if not self._running:
            return 0.0
        with self._lock:
            oldest = min((operation.began for operation in self._running), default=0.0)
        return time.monotonic() - oldest if oldest else 0.0

    async def run(self, work: Callable[[], T], late: Callable[[], None] | None = None) -> T:
        """The result of ``work``, done in a thread; raises what it raises.

        ``late``: called on the loop once the work is over, where we stopped waiting for it (or never began it).

        Raises:
            Unavailable: the tier is away, or went away meanwhile.
        """
        loop = asyncio.get_running_loop()
        arrived = asyncio.Event()
        try:
            operation = self._submit(work)
        except Unavailable:
            if late is not None:
                late()
            raise
        operation.future.add_done_callback(lambda _: _soon(loop, arrived.set))
        try:
            while not arrived.is_set():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._patience(operation)):
                        await arrived.wait()
                if not arrived.is_set() and self.away:
                    raise Unavailable(f"the {self._name} does not answer")
        except BaseException:
            operation.future.cancel()
            if late is not None:
                operation.future.add_done_callback(lambda _: _soon(loop, late))
            raise
        return operation.future.result()

    def call(self, work: Callable[[], T]) -> T:
        """As `run`, for a thread that may wait. Raises Unavailable, and what ``work`` raises."""
        operation = self._submit(work)
        while True:
            try:
                return operation.future.result(self._patience(operation))
            except TimeoutError:
                if operation.future.done():
                    raise  # the work's own
                if self.away:
                    operation.future.cancel()
                    raise Unavailable(f"the {self._name} does not answer") from None

    def close(self) -> None:
        """Wait a moment for what is under way; idempotent."""
        self._closed = True
        self._workers.close(CLOSE_SECONDS)

    def _submit(self, work: Callable[[], T]) -> _Operation[T]:
        if self._closed:
            raise Unavailable(f"the {self._name} is closed")
        if self.away:
            raise Unavailable(f"the {self._name} does not answer")
        operation = _Operation(work)
        self._workers.submit(lambda: self._carry_out(operation))
        return operation

    def _patience(self, operation: _Operation[T]) -> float:
        """How long to wait before the next look: until it, or else what keeps it waiting, is overdue."""
        under_way = time.monotonic() - operation.began if operation.began else self.lag()
        return max(0.001, self._seconds - under_way)

    def _carry_out(self, operation: _Operation[T]) -> None:
        work, operation.work = operation.work, None  # it keeps alive what it writes to, no longer than needed
        assert work is not None
        if not operation.future.set_running_or_notify_cancel():
            return
        operation.began = time.monotonic()
        with self._lock:
            self._running.add(operation)  # type: ignore[arg-type]
        try:
            result = work()
        except BaseException as error:
            self._over(operation)
            operation.future.set_exception(error)
        else:
            self._over(operation)
            operation.future.set_result(result)

    def _over(self, operation: _Operation[T]) -> None:
        with self._lock:
            self._running.discard(operation)
        if self._said and not self.away:
            self._said = False
            log.warning("kvshare: the %s answers again", self._name)


def _soon(loop: asyncio.AbstractEventLoop, action: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits any more
        loop.call_soon_threadsafe(action)
