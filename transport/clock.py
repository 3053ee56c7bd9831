"""Deadlines without polling: one thread that sleeps until the earliest one, made when the first is set.

Threads: `at` and `close` may be called from any thread; actions run on the clock's own and must be short.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable

log = logging.getLogger("kvshare")


class Clock:
    def __init__(self, name: str) -> None:
        self._name = name
        self._actions: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Call ``action`` in so many seconds. A closed clock never does."""
        with self._changed:
            if self._closed:
                return
            heapq.heappush(self._actions, (time.monotonic() + seconds, next(self._numbers), action))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify()

    def close(self) -> None:
        """Drop what has not been done; idempotent. Not to be called by an action."""
        with self._changed:
            self._closed = True
            self._actions.clear()
            self._changed.notify()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        while (action := self._next()) is not None:
            try:
                action()
            except Exception:
                log.exception("kvshare: an action at a deadline failed")

    def _next(self) -> Callable[[], None] | None:
        with self._changed:
            while not self._closed:
                if not self._actions:
                    self._changed.wait()
                elif (left := self._actions[0][0] - time.monotonic()) > 0:
                    self._changed.wait(left)
                else:
                    return heapq.heappop(self._actions)[2]
        return None
