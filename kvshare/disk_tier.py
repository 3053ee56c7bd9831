"""A node's disk: a `DiskRegion` and a `Store` for each slot size, opened in the background, grown ahead of need.

    DiskFolder ─> DiskRegion (files, headers in memory) + Store (index, eviction, reservations)     one per slot size
                      └─> served to peers (`kvshare.disk_served`)

All regions together hold ``disk_bytes``. A region that cannot be opened is said once with the remedy; the node goes on without
it. Whatever waits for the disk runs in `kvshare.blocking`: while it does not answer, nothing of it is found.

Threads: all on the node's loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from kvshare.blocking import Blocking
from kvshare.disk import DiskFolder, DiskRegion
from kvshare.disk_served import Served
from kvshare.errors import KVShareError, RegionError, Unavailable
from kvshare.expiry import ExpiryTimer
from kvshare.loading import Source
from kvshare.native import I64, U8, U64, BlockStatus
from kvshare.places import DISK, RegionDescription, Stored
from kvshare.purge import Matches
from kvshare.purging import clean_store, purge_store
from kvshare.quota import Quota
from kvshare.region import second_now
from kvshare.store import Store
from kvshare.vault import Vault

if TYPE_CHECKING:
    from kvshare.memory import Memory

log = logging.getLogger("kvshare")

OWNER = -2  # of our reservations in the disk's stores
OPEN_SECONDS = 300.0  # to read a table: a hundred million slots
ADOPTED_AT_ONCE = 4096  # blocks told of between two turns of the loop

Changed = Callable[[list[Stored], list[bytes]], None]


class DiskTier:
    """See the module's docstring. ``folder``: owned by this node; ``on_changed(stored, removed)``, to be set before `start`,
    hears of what came and went."""

    on_changed: Changed

    def __init__(self, memory: Memory, folder: DiskFolder, vault: Vault) -> None:
        settings = memory.settings
        self._memory = memory
        self._folder = folder
        self._vault = vault
        self._blocking = Blocking("disk", "disk_seconds", settings.disk_threads, settings.disk_seconds)
        self._opener = Blocking("disk's table", "disk_dir", 1, OPEN_SECONDS)  # a long scan is no stalled disk
        self.source: Source = (settings.node_name, DISK)
        self.regions: dict[int, DiskRegion] = {}  # by their number: slot size + 1
        self.stores: dict[int, Store] = {}
        self.quota = Quota(memory.tenants, second_now())
        self._expiry = ExpiryTimer(self.stores, self.flush)
        self._opening: dict[int, asyncio.Task[None]] = {}  # by slot size
        self._growing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Open what lies in the folder."""
        self._spawn(self._find())

    def want(self, slot_bytes: int) -> None:
        """Open the region of this slot size, or make it, if that has not begun."""
        if slot_bytes not in self._opening:
            self._opening[slot_bytes] = self._spawn(self._open(slot_bytes))

    # --- questions ----------------------------------------------------------------------------------------------------

    def block(self, key: bytes) -> Stored | None:
        """Where it lies; a question of the index alone."""
        for store in self.stores.values():
            block = store.lookup([key])[0]
            if block is not None:
                return block
        return None

    def length(self, key: bytes) -> int:
        """Bytes of the block that can be read under this key; 0 where there is none, or the disk does not answer."""
        if self._blocking.away:
            return 0
        block = self.block(key)
        return 0 if block is None else block.length

    def missing(self, keys: Sequence[bytes]) -> list[bytes]:
        return [key for key in keys if self.block(key) is None]

    def expires(self, key: bytes) -> int:
        block = self.block(key)
        return 0 if block is None else block.expires

    def lag(self) -> float:
        """For how long the disk has been at its oldest work."""
        return self._blocking.lag()

    def inventory(self) -> Iterator[Stored]:
        for store in list(self.stores.values()):
            yield from store.inventory()

    def describe(self, node: str, host: str, endpoint: str) -> tuple[RegionDescription, ...]:
        return tuple(region.describe(node, host, endpoint) for region in self.regions.values())

    @property
    def counters(self) -> dict[str, int]:
        """Sums over all slot sizes of some of the stores' counters, named ``disk_...``."""
        names = ("blocks", "bytes", "stored", "evicted", "corrupt")
        found = [store.counters for store in self.stores.values()]
        return {f"disk_{name}": sum(counters[name] for counters in found) for name in names} | self.quota.counters("disk_")

    def check(self) -> list[str]:
        problems = [f"disk region {number}: {problem}" for number, store in self.stores.items() for problem in store.check()]
        held = ((block.key, number - 1) for number, store in self.stores.items() for block in store.inventory())
        return problems + self.quota.check(held)

    # --- blocks -------------------------------------------------------------------------------------------------------

    def touch(self, keys: Sequence[bytes]) -> None:
        for store in self.stores.values():
            store.touch(keys)

    async def write(self, blocks: Sequence[Stored]) -> int:
        """Write blocks of one of our arenas; see `kvshare.demotion.Keeper`."""
        arena = self._memory.arenas[blocks[0].region]
        number = arena.slot_bytes + 1
        await asyncio.wait([self._opening[arena.slot_bytes]])
        if number not in self.regions or self._blocking.away:
            return 0
        region, store = self.regions[number], self.stores[number]
        await self._make_room(number, len(blocks))
        now = time.monotonic()
        pairs = [store.reserve([block.key], block.length, OWNER, now, [block.expires])[0] for block in blocks]
        self.flush(number)
        chosen = [i for i, (slot, _) in enumerate(pairs) if slot >= 0]
        if not chosen:
            return 0
        slots, generations = [pairs[i][0] for i in chosen], [pairs[i][1] for i in chosen]
        mine = [blocks[i] for i in chosen]
        origin = np.array([block.slot for block in mine], np.int64)
        told = np.array([block.generation for block in mine], np.uint64)
        checksums: list[int] = []

        def still_there() -> list[bool]:
            same: list[bool] = (arena.generations(origin) == told).tolist()  # else evicted meanwhile
            return same

        def work() -> list[bool]:
            checksums.extend(arena.checksums(origin).tolist())
            return region.write(
                slots,
                [block.key for block in mine],
                [block.length for block in mine],
                checksums,
                [arena.slot_address(block.slot) for block in mine],
                [block.expires for block in mine],
                still_there,
            )

        kept = await self._reserved(store, slots, generations, work)
        good = [i for i, ok in enumerate(kept) if ok]
        bad = [i for i, ok in enumerate(kept) if not ok]
        store.abort([slots[i] for i in bad], [generations[i] for i in bad], OWNER)
        stored = store.commit([slots[i] for i in good], [generations[i] for i in good], [checksums[i] for i in good], OWNER)
        self.flush(number, stored)
        return len(stored)

    async def read(self, keys: Sequence[bytes], addresses: U64, length: int, late: Callable[[], None]) -> tuple[U8, U64]:
        """Read blocks; see `kvshare.promotion.Tier`."""
        statuses, checksums = np.full(len(keys), BlockStatus.STALE, np.uint8), np.zeros(len(keys), np.uint64)
        held = [self.block(key) for key in keys]
        numbers = {block.region for block in held if block is not None}
        if len(numbers) != 1:
            return statuses, checksums  # gone meanwhile
        number = numbers.pop()
        region = self.regions[number]
        chosen = [(i, block) for i, block in enumerate(held) if block is not None]
        positions = [i for i, _ in chosen]
        slots, generations = [block.slot for _, block in chosen], [block.generation for _, block in chosen]

        def work() -> U8:
            checksums[positions] = region.checksums(slots)
            return region.read(slots, generations, [keys[i] for i in positions], addresses[positions].tolist(), length)

        statuses[positions] = await self._blocking.run(work, late)
        self._judge(number, [block for _, block in chosen], statuses[positions])
        return statuses, checksums

    def _judge(self, number: int, blocks: list[Stored], statuses: U8) -> None:
        """Blocks that are damaged go, and those that alone cannot be read: where all cannot, it is the disk."""
        bad = statuses == BlockStatus.CORRUPT
        if (statuses == BlockStatus.OK).any():
            bad |= statuses == BlockStatus.UNREACHABLE
        corrupt = [blocks[i] for i in np.flatnonzero(bad).tolist()]
        if corrupt and number in self.stores:
            log.warning("kvshare: %d blocks on the disk failed their verification; they are taken out", len(corrupt))
            slots, generations = [block.slot for block in corrupt], [block.generation for block in corrupt]
            self.stores[number].quarantine(slots, generations, time.monotonic())
            self.flush(number)

    async def _reserved(
        self, store: Store, slots: list[int], generations: list[int], work: Callable[[], list[bool]]
    ) -> list[bool]:
        """The result of ``work``, which writes to reserved slots: if it fails they are free again, once it is over."""

        def release() -> None:
            store.abort(slots, generations, OWNER)

        try:
            return await self._blocking.run(work, release)
        except (Unavailable, asyncio.CancelledError):
            raise
        except BaseException:
            release()
            raise

    def flush(self, number: int, stored: Sequence[Stored] = ()) -> None:
        """Tell what changed in a region."""
        removed = [key for store in self.stores.values() for key in store.take_removed()]
        if stored or removed:
            self.on_changed(list(stored), removed)
        self._expiry.watch()

    # --- regions ------------------------------------------------------------------------------------------------------

    async def _find(self) -> None:
        try:
            sizes = await self._blocking.run(self._folder.slot_sizes)
        except (KVShareError, OSError) as error:
            log.warning("kvshare: what is on the disk cannot be read: %s", error)
            return
        for slot_bytes in sizes:
            self.want(slot_bytes)

    async def _open(self, slot_bytes: int) -> None:
        memory = self._memory
        try:
            capacity = max(memory.settings.disk_bytes, slot_bytes)
            region = await self._opener.run(
                partial(DiskRegion.open, self._folder, slot_bytes, capacity, self._vault, say_progress=_say)
            )
        except (RegionError, Unavailable, OSError) as error:
            log.warning("kvshare: blocks of %d bytes are not kept on disk: %s", slot_bytes, error)
            return
        store = Store(region, memory.settings, quota=self.quota)
        store.gate = memory.gate
        adopt = partial(store.adopt, region.recovered, now=time.monotonic())
        # A million blocks take a second. Nobody else has the store yet; a quota others have too.
        recovered = adopt() if memory.tenants.limited else await asyncio.to_thread(adopt)
        region.recovered = []
        self.regions[region.region], self.stores[region.region] = region, store
        memory.served(Served(region, self._blocking, partial(self._damaged, asyncio.get_running_loop())))
        if recovered:
            log.info("kvshare: %d blocks of %d bytes are on the disk", len(recovered), slot_bytes)
        for start in range(0, len(recovered), ADOPTED_AT_ONCE):
            # Those that are still there: others may have been reused since the last turn.
            self.on_changed([block for block in recovered[start : start + ADOPTED_AT_ONCE] if self._holds(block)], [])
            await asyncio.sleep(0)
        if any(store.soiled):  # of tenants that may not be here
            try:
                await clean_store(store, _Punched(region, self._blocking))
            except (KVShareError, OSError) as error:
                log.warning("kvshare: blocks that may not be here could not be erased from the disk: %s", error)

    def _holds(self, block: Stored) -> bool:
        return self.stores[block.region].lookup([block.key])[0] == block

    async def _make_room(self, number: int, blocks: int) -> None:
        """Grow before something is evicted for want of room, if we may."""
        region, store = self.regions[number], self.stores[number]
        async with self._growing:
            while store.free_slots < blocks:
                held = sum(one.available_slots * one.slot_bytes for one in self.regions.values())
                step = min(region.chunk_slots, region.slots - region.available_slots) * region.slot_bytes
                # A region without any slot gets its first chunk in any case: a second model must not go without.
                over = region.available_slots and held + step > self._memory.settings.disk_bytes
                if not step or over or not await self._blocking.run(region.grow):
                    return
                store.extend()

    def _damaged(self, loop: asyncio.AbstractEventLoop, region: DiskRegion, slots: I64, generations: U64) -> None:
        """Blocks that a peer asked for are damaged; from any thread."""
        blocks = [Stored(b"", region.region, *pair, 0) for pair in zip(slots.tolist(), generations.tolist(), strict=True)]
        loop.call_soon_threadsafe(self._judge, region.region, blocks, np.full(len(blocks), BlockStatus.CORRUPT, np.uint8))

    async def purge(self, matches: Matches) -> tuple[int, int]:
        """Blocks and bytes that are gone from files too. Raises KVShareError, OSError when they may not be."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))  # what a former node left counts as well
        blocks = bytes_ = 0
        for number, store in list(self.stores.items()):
            punched = _Punched(self.regions[number], self._blocking)
            gone = await purge_store(store, punched, matches, partial(self.flush, number))
            blocks, bytes_ = blocks + gone[0], bytes_ + gone[1]
        return blocks, bytes_

    async def clean(self) -> None:
        """Erase what had to rest at a purge. Raises as `purge`."""
        for number, store in list(self.stores.items()):
            store.expire(time.monotonic())
            self.flush(number)
            await clean_store(store, _Punched(self.regions[number], self._blocking))

    # --- life ---------------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """When this returns the files are whole and others may own the folder, unless the disk does not answer."""
        self._expiry.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for region in self.regions.values():
            try:
                await self._blocking.run(region.close)
            except (KVShareError, OSError) as error:
                log.warning("kvshare: the disk region could not be closed: %s; what was kept is whole", error)
        await asyncio.to_thread(self._blocking.close)
        await asyncio.to_thread(self._opener.close)
        self._folder.close()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


class _Punched:
    """A disk region as `kvshare.purging` erases it, in a thread that may wait."""

    def __init__(self, region: DiskRegion, blocking: Blocking) -> None:
        self.slot_bytes = region.slot_bytes
        self._disk = region
        self._blocking = blocking

    def punch(self, slots: Sequence[int]) -> None:
        """Raises Unavailable, RegionError."""
        self._blocking.call(lambda: self._disk.punch(slots))


def _say(sentence: str) -> None:
    log.info("kvshare: %s", sentence)
