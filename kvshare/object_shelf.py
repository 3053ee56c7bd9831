"""A node's way to the object store: what it asks of `kvshare.objectstore.ObjectTier`, from the loop.

    demotion, hand-over ─> blocks of the arena, or of the disk through a buffer ─> segments
    promotion <─ ranges of segments <─ catalog (in memory) <─ refresh: at the start, and when something was not found

The catalog is learned in the background; nothing waits for a listing. When something is not found, others may have written it
since: the next refresh is due then, at most every `REFRESH_SECONDS`.

Threads: all on the node's loop; the store is asked in `kvshare.blocking`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from kvshare import keys as key_functions
from kvshare import native
from kvshare.blocking import Blocking
from kvshare.disk_io import PAGE_BYTES
from kvshare.errors import KVShareError, Unavailable
from kvshare.loading import Source
from kvshare.mapping import Mapping
from kvshare.native import U8, U64, BlockStatus
from kvshare.objectstore import ObjectTier, PutBlock
from kvshare.places import Stored
from kvshare.region import second_now

if TYPE_CHECKING:
    from kvshare.disk_tier import DiskTier
    from kvshare.memory import Memory

log = logging.getLogger("kvshare")

THREADS = 4
REFRESH_SECONDS = 10.0  # between two listings that misses ask for
EXPIRE_SECONDS = 600.0  # between two rounds of upkeep
SETTLE_SECONDS = 20.0  # a purge waits so long for what is being put
REQUESTS = 4  # of one operation, one behind the other, each of ``object_seconds``


class ObjectShelf:
    """See the module's docstring."""

    def __init__(self, memory: Memory, store: ObjectTier, disk: DiskTier | None) -> None:
        settings = memory.settings
        self._memory = memory
        self._store = store
        self._disk = disk
        self._blocking = Blocking("object store", "object_seconds", THREADS, REQUESTS * settings.object_seconds)
        self.source: Source = (settings.node_name, "object")
        self._refreshed = -REFRESH_SECONDS
        self._kept_up = time.monotonic()
        self._tasks: set[asyncio.Task[None]] = set()
        self._putting: set[asyncio.Event] = set()

    def refresh(self) -> None:
        """Learn in the background what others have written, if that is due."""
        now = time.monotonic()
        if now - self._refreshed < REFRESH_SECONDS or self._tasks:
            return
        self._refreshed = now
        task = asyncio.get_running_loop().create_task(self._learn())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _learn(self) -> None:
        try:
            await self._blocking.run(self._store.refresh)
            if time.monotonic() - self._kept_up >= EXPIRE_SECONDS:
                self._kept_up = time.monotonic()
                await self._blocking.run(lambda: self._store.expire(second_now()))
        except KVShareError as error:
            log.debug("kvshare: %s", error)  # the store says so itself, once

    # --- questions ----------------------------------------------------------------------------------------------------

    def length(self, key: bytes) -> int:
        if self._blocking.away:
            return 0
        return self._store.held([key])[0] or 0

    def missing(self, keys: Sequence[bytes]) -> list[bytes]:
        return [key for key, length in zip(keys, self._store.held(keys), strict=True) if not length]

    def lengths(self, keys: Sequence[bytes]) -> list[int]:
        """As `length`, of many. Where some are not held a refresh is due."""
        if self._blocking.away:
            return [0] * len(keys)
        held = [length or 0 for length in self._store.held(keys)]
        if 0 in held:
            self.refresh()
        return held

    def expires(self, key: bytes) -> int:
        return self._store.ends(key)

    @property
    def counters(self) -> dict[str, int]:
        return {"object_blocks": self._store.held_blocks, "object_bytes": self._store.held_bytes}

    # --- blocks -------------------------------------------------------------------------------------------------------

    async def read(self, keys: Sequence[bytes], addresses: U64, length: int, late: Callable[[], None]) -> tuple[U8, U64]:
        """Read blocks; see `kvshare.promotion.Tier`."""

        def work() -> tuple[U8, U64]:
            statuses = self._store.get(keys, addresses, length)
            seeds = np.array(key_functions.seeds_of(keys), np.uint64)
            column = np.asarray(addresses, np.uint64).reshape(-1, 1)
            return statuses, native.checksums(column, np.full_like(column, length), seeds)

        statuses, checksums = await self._blocking.run(work, late)
        if (statuses == BlockStatus.UNREACHABLE).all():
            raise Unavailable("the object store does not answer")
        return statuses, checksums

    async def write(self, blocks: Sequence[Stored]) -> int:
        """Write blocks, all of one region of ours, arena or disk; see `kvshare.demotion.Keeper`."""
        blocks = [block for block in blocks if self._may_put(block.key)]
        arena = self._memory.arenas.get(blocks[0].region) if blocks else None
        if arena is None:
            return await self._write_from_disk(blocks)

        def work() -> int:
            # What is given away while it is put does not have this checksum any more, and is left out.
            checksums = arena.checksums([block.slot for block in blocks]).tolist()
            return self._store.put(
                [
                    PutBlock(block.key, checksum, block.expires, native.view(arena.slot_address(block.slot), block.length))
                    for block, checksum in zip(blocks, checksums, strict=True)
                ]
            )

        return await self._put(work)

    def _may_put(self, key: bytes) -> bool:
        """Not what is being purged, nor of a tenant that may not be where the store is."""
        gate = self._memory.gate
        return gate is None or not (gate.bars(key) or not gate.may_go_to(key, self._memory.settings.object_region))

    async def _put(self, work: Callable[[], int]) -> int:
        """Do it, known to `settle` until it is over, whoever stops waiting for it."""
        done = asyncio.Event()
        self._putting.add(done)
        done_at_last = partial(self._over, done)
        try:
            count = await self._blocking.run(work, done_at_last)
        except (Unavailable, asyncio.CancelledError):
            raise  # it may go on
        except BaseException:
            self._over(done)
            raise
        self._over(done)
        return count

    def _over(self, done: asyncio.Event) -> None:
        self._putting.discard(done)
        done.set()

    async def settle(self) -> None:
        """Return when all puts that are under way now are over. Raises Unavailable when they take too long."""
        try:
            async with asyncio.timeout(SETTLE_SECONDS):
                for done in list(self._putting):
                    await done.wait()
        except TimeoutError as error:
            raise Unavailable("the object store has not ended what it was given to keep") from error

    async def _write_from_disk(self, blocks: Sequence[Stored]) -> int:
        """Through a buffer of ours, blocks of one length at a time."""
        written = 0
        disk = self._disk
        assert disk is not None
        for length in dict.fromkeys(block.length for block in blocks):
            alike = [block for block in blocks if block.length == length]
            stride = -(-length // PAGE_BYTES) * PAGE_BYTES
            buffer = Mapping.anonymous(len(alike) * stride)
            addresses = np.uint64(buffer.address) + np.arange(len(alike), dtype=np.uint64) * np.uint64(stride)
            names, over = [block.key for block in alike], partial(_let_go, buffer)
            statuses, checksums = await disk.read(names, addresses, length, over)
            good = np.flatnonzero(statuses == BlockStatus.OK).tolist()
            data = [native.view(int(addresses[i]), length) for i in good]
            put = [PutBlock(alike[i].key, int(checksums[i]), alike[i].expires, data[at]) for at, i in enumerate(good)]
            written += await self._put(lambda put=put, _=buffer: self._store.put(put))  # type: ignore[misc]
        return written

    # --- life ---------------------------------------------------------------------------------------------------------

    async def purge(self, matches: Callable[[bytes], bool]) -> tuple[int, int]:
        """Blocks and bytes removed. Raises KVShareError when that cannot be said."""
        return await self._blocking.run(lambda: self._store.purge(matches))

    async def forget(self, matches: Callable[[bytes], bool]) -> None:
        """Somebody is about to remove these: find them no more."""
        await asyncio.to_thread(self._store.forget, matches)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._blocking.close)
        await asyncio.to_thread(self._store.close)


def _let_go(buffer: Mapping) -> None:
    """Nothing to do: whoever is to call this keeps ``buffer`` until nothing writes to it any more."""
