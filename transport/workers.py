"""A few threads that do what they are given: made as needed, asleep when idle.

As `concurrent.futures` without futures, which cost more than a small read.

Threads: all methods from any thread.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

log = logging.getLogger("kvshare")


class Workers:
    """Up to ``threads_max`` threads called ``name``."""

    def __init__(self, name: str, threads_max: int) -> None:
        self._name = name
        self._threads_max = threads_max
        self._threads: list[threading.Thread] = []
        self._tasks: deque[Callable[[], None]] = deque()
        self._idle = 0
        self._closed = False
        self._changed = threading.Condition(threading.Lock())

    def submit(self, task: Callable[[], None]) -> None:
        """Run ``task`` soon. After `close` it is dropped."""
        with self._changed:
            if self._closed:
                return
            self._tasks.append(task)
            if self._idle >= len(self._tasks):
                self._changed.notify()
            elif len(self._threads) < self._threads_max:
                thread = threading.Thread(target=self._run, name=f"{self._name}-{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()

    def close(self) -> None:
        """Do what was submitted, then end the threads; idempotent. Not to be called by a task."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            threads = list(self._threads)
        for thread in threads:
            thread.join()

    def _run(self) -> None:
        while (task := self._next()) is not None:
            try:
                task()
            except Exception:
                log.exception("kvshare: a task of %s failed", self._name)

    def _next(self) -> Callable[[], None] | None:
        with self._changed:
            while not self._tasks:
                if self._closed:
                    return None
                self._idle += 1
                self._changed.wait()
                self._idle -= 1
            return self._tasks.popleft()
