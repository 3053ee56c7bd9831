"""The moments at which a tier's stores have something to do: slots that have rested, blocks whose time is over.

    whoever changed a store ─> watch() ─> one timer, for the earliest moment ─> expire(), then flush(number) of each store

Threads: all on the node's loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

from kvshare.store import Store

PAUSE_SECONDS = 0.01  # at least, between two rounds: a store gives up a limited number of blocks in each


class ExpiryTimer:
    """See the module's docstring. stores: by number, of one tier; it may grow. flush: tells what left the store of a number."""

    def __init__(self, stores: Mapping[int, Store], flush: Callable[[int], None]) -> None:
        self._stores = stores
        self._flush = flush
        self._timer: asyncio.TimerHandle | None = None
        self._moment = 0.0  # of the timer

    def watch(self) -> None:
        """See to it that the next moment is not missed. Cheap: called after every change."""
        moments = [moment for store in self._stores.values() if (moment := store.next_expiry()) is not None]
        if not moments or (self._timer is not None and self._moment <= min(moments)):
            return
        self.close()
        self._moment = max(min(moments), time.monotonic() + PAUSE_SECONDS)
        self._timer = asyncio.get_running_loop().call_later(self._moment - time.monotonic(), self._expire)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        self._timer = None
        for number, store in list(self._stores.items()):
            store.expire(time.monotonic())
            self._flush(number)
        self.watch()
