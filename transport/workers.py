"""A few threads that do what they are given: made as needed, asleep when idle.

As `concurrent.futures` without futures, which cost more than a small read.

Threads: all methods from any thread.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

log = logging.getLogger("kvshare")


class Workers:
    """Up to ``threads_max`` threads called ``name``."""

    def __init__(self, name: str, threads_max: int) -> None:
        self._name = name
        self._threads_max = threads_max
        self._threads: list[threading.Thread] = []
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._load = 0  # tasks that wait or run
        self._closed = False
        self._lock = threading.Lock()

    def submit(self, task: Callable[[], None]) -> None:
        """Run ``task`` soon. After `close` it is dropped."""
        with self._lock:
            if self._closed:
                return
            self._load += 1
            if len(self._threads) < min(self._load, self._threads_max):
                thread = threading.Thread(target=self._run, name=f"{self._name}-{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()
            self._tasks.put(task)

    def close(self, seconds: float | None = None) -> None:
        """Do what was submitted, then end the threads; idempotent. Not to be called by a task. ``seconds``: wait no longer for
        threads that a task holds up."""
        with self._lock:
            if not self._closed:
                for _ in self._threads:
                    self._tasks.put(None)
            self._closed = True
        deadline = None if seconds is None else time.monotonic() + seconds
        for thread in self._threads:
            thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                task()
            except Exception:
                log.exception("kvshare: a task of %s failed", self._name)
            with self._lock:
                self._load -= 1
