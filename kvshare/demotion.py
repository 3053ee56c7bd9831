"""Demotion: blocks of the arena that deserve a place in a slow tier are written there, in batches, in the background.

    saved ("all"), used again ("used"), kept (hand-over) ─> queue ─> a batch ─> `Keeper.write` (threads)

The queue holds keys, not blocks: nothing is pinned, and a block that the arena has given up meanwhile is skipped. Writers never
use all of a tier's threads, so that reads go on.

Threads: all on the node's loop; writing is done in the tier's threads.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from kvshare.errors import KVShareError, Unavailable
from kvshare.places import Stored

log = logging.getLogger("kvshare")

T = TypeVar("T")
Locate = Callable[[bytes], Stored | None]

QUEUE_KEYS_MAX = 1 << 16  # beyond it what comes is skipped: the device is slower than what is saved
RETRY_SECONDS = 1.0  # before the next attempt at a tier that does not answer


class Keeper(Protocol):
    """A tier that blocks can be written to. All on the loop."""

    def missing(self, keys: Sequence[bytes]) -> list[bytes]:
        """Those of ``keys`` that it does not have, in order."""

    async def write(self, blocks: Sequence[Stored]) -> int:
        """Write these blocks of the arena, all of one region; returns how many are there now.

        Raises:
            Unavailable, KVShareError, OSError: none are.
        """


class Way(NamedTuple):
    """How blocks are written to a tier: so many writers, a batch of about so many bytes each, after a pause for more."""

    writers: int
    batch_bytes: int
    pause_seconds: float = 0.0


class Demotion:
    """See the module's docstring. ``locate``: where we have a block, None where we do not (any more)."""

    def __init__(self, keeper: Keeper, locate: Locate, way: Way) -> None:
        self._keeper = keeper
        self._locate = locate
        self._way = way
        self._queue: OrderedDict[bytes, None] = OrderedDict()
        self._writers = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self.counters = {"demoted_blocks": 0, "demotion_skipped": 0, "demotion_failed": 0}

    async def keep(self, keys: Iterable[bytes], deadline: float) -> None:
        """Write these until ``deadline`` (`time.monotonic`)."""
        left = iter(keys)
        running: set[asyncio.Task[int]] = set()
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                while batch := self._batch(left):
                    if len(running) >= self._way.writers:
                        _, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    running.add(self._start(self._write(batch)))
                # Ours, and what the queue's writers have in hand: it counts as missing until it is there.
                if self._tasks:
                    await asyncio.wait(set(self._tasks))
        except TimeoutError:
            log.warning("kvshare: not all blocks could be kept in time")

    async def close(self) -> None:
        """When this returns nothing is queued, and only a device that does not answer may still be at a write."""
        self._queue.clear()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def offer(self, keys: Sequence[bytes]) -> None:
        """Write these soon, in this order."""
        fresh = self._keeper.missing([key for key in keys if key not in self._queue])
        room = QUEUE_KEYS_MAX - len(self._queue)
        self.counters["demotion_skipped"] += max(0, len(fresh) - room)
        self._queue.update(dict.fromkeys(fresh[:room]))
        if self._queue and self._writers < self._way.writers:
            self._writers += 1
            self._start(self._run())

    async def _run(self) -> None:
        """Write what is queued, batch by batch, until nothing is."""
        try:
            pause = self._way.pause_seconds  # what comes meanwhile shares a batch
            while True:
                await asyncio.sleep(pause)
                batch = self._batch(self._queued())
                if not batch:
                    return
                full = sum(block.length for block in batch) >= self._way.batch_bytes
                pause = 0.0 if full else self._way.pause_seconds
                if not await self._write(batch) and self._queue:
                    pause = RETRY_SECONDS
        finally:
            self._writers -= 1

    def _queued(self) -> Iterator[bytes]:
        while self._queue:
            yield self._queue.popitem(last=False)[0]

    def _batch(self, keys: Iterator[bytes]) -> list[Stored]:
        """Blocks of the next of ``keys`` that we have and the tier has not; takes no more keys than needed."""
        blocks: list[Stored] = []
        taken = 0
        while taken < self._way.batch_bytes and (key := next(keys, None)) is not None:
            block = self._locate(key)
            if block is not None and self._keeper.missing([key]):
                blocks.append(block)
                taken += block.length
        return blocks

    async def _write(self, blocks: list[Stored]) -> int:
        """How many of them are in the tier now."""
        written = 0
        for region in dict.fromkeys(block.region for block in blocks):
            try:
                written += await self._keeper.write([block for block in blocks if block.region == region])
            except Unavailable as error:
                log.debug("kvshare: %s", error)
            except (KVShareError, OSError) as error:
                log.info("kvshare: blocks could not be kept: %s", error)
        self.counters["demoted_blocks"] += written
        self.counters["demotion_failed"] += len(blocks) - written
        return written

    def _start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
