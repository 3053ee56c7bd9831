"""A node's memory: its regions (one per slot size), their stores, their growth, and what it knows of peers' regions.

    engine's block length ─> slot size (whole pages) ─> Arena (files in shm) + Store (index, eviction, reservations)

Regions grow chunk by chunk, in a thread, ahead of need, until all together hold ``arena_bytes``.

Threads: everything on the node's loop, except opening and growing an arena (system calls that take long), done in the
loop's thread pool.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from msgspec.structs import replace

from kvshare import device
from kvshare.config import Settings
from kvshare.cost import Rates
from kvshare.errors import RegionError
from kvshare.expiry import ExpiryTimer
from kvshare.gate import Gate
from kvshare.places import NodeDescription, RegionDescription, Stored
from kvshare.quota import Ends, Quota
from kvshare.region import second_now
from kvshare.slots import Arena
from kvshare.store import Store
from kvshare.tenants import Tenants
from kvshare.tiers import Tiers
from kvshare.transport.choose import Transports
from kvshare.transport.tcp_staged import Staged

log = logging.getLogger("kvshare")

PAGE_BYTES = 4096

GROWTH_NICENESS = 10

Changed = Callable[[list[Stored], list[bytes]], None]


class Memory:
    """See the module's docstring. ``on_changed(stored, removed)`` hears of every change of the arenas, ``on_published(stored,
    removed)`` of every change of what the node has, ``on_region()`` of a new region, before blocks in it are told of."""

    tiers: Tiers  # from `open` on

    def __init__(
        self,
        settings: Settings,
        transports: Transports,
        host: str,
        on_changed: Changed,
        on_published: Changed,
        on_region: Callable[[], None],
        tenants: Tenants | None = None,
    ) -> None:
        self.settings = settings
        self._transports = transports
        self._host = host
        self._on_changed = on_changed
        self._on_published = on_published
        self._on_region = on_region
        self.tenants = tenants if tenants is not None else Tenants()
        self.quota = Quota(self.tenants, second_now())
        self.ends = Ends(self.quota.second)
        self.arenas: dict[int, Arena] = {}
        self.stores: dict[int, Store] = {}
        self._opening = asyncio.Lock()
        self._growing: set[int] = set()
        self._exhausted: set[int] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        # Clearing memory takes as long as copying it, and is done ahead of need: others go first.
        self._grower = ThreadPoolExecutor(1, "kvshare-grow", initializer=_step_back)
        self._expiry = ExpiryTimer(self.stores, self.flush)
        self.peers: dict[str, NodeDescription] = {}
        self.gate: Gate | None = None  # of all our stores

    async def open(self, rates: Rates) -> None:
        """Open what a former node of this name left behind. ``rates``: learns those of slow tiers. Raises ConfigError."""
        self.tiers = await Tiers.open(self, rates, self._on_published)
        self.tiers.start()
        stem = Path(self.settings.arena_stem)
        device.remove_stale(str(stem))
        for path in sorted(stem.parent.glob(f"{stem.name}-*.table")):
            size = path.name.removeprefix(f"{stem.name}-").removesuffix(".table")
            if size.isdigit():
                try:
                    await self.region_for(int(size))
                except RegionError as error:
                    log.warning("kvshare: left %s alone: %s", path, error)

    async def region_for(self, length: int) -> tuple[Arena, Store]:
        """The region for blocks of ``length`` bytes, made if need be. Raises RegionError."""
        slot_bytes = -(-length // PAGE_BYTES) * PAGE_BYTES
        async with self._opening:
            if slot_bytes not in self.arenas:
                arena = await asyncio.to_thread(self._open, slot_bytes)
                store = Store(arena, self.settings, quota=self.quota)
                store.gate = self.gate
                self.arenas[slot_bytes], self.stores[slot_bytes] = arena, store
                recovered = store.adopt(arena.recovered, arena.unsettled, time.monotonic())
                if recovered:
                    log.info("kvshare: recovered %d blocks of %d bytes", len(recovered), slot_bytes)
                self._transports.register(arena)
                self._on_region()
                self.tiers.opened(slot_bytes)
                self.flush(slot_bytes, recovered)
        return self.arenas[slot_bytes], self.stores[slot_bytes]

    @property
    def free_bytes(self) -> int:
        """Room for more blocks, of all slot sizes together, without pushing any out."""
        held = sum(arena.available_slots * arena.slot_bytes for arena in self.arenas.values())
        chunk = self.settings.arena_chunk_bytes
        growth = max(0, self.settings.arena_bytes - held) // chunk * chunk if not self._exhausted else 0
        return growth + sum(store.free_slots * region for region, store in self.stores.items())

    def describe(self, node: str, endpoint: str) -> tuple[RegionDescription, ...]:
        arenas = tuple(self.region(number, node, endpoint) for number in self.arenas)
        return arenas + self.tiers.describe(node, self._host, endpoint)

    def region(self, number: int, node: str, endpoint: str) -> RegionDescription:
        """One of our arenas, for those who read it."""
        arena = self.arenas[number]
        return replace(arena.describe(node, self._host, endpoint), memory=self._transports.memory_of(arena))

    def served(self, source: Staged) -> None:
        """A slow tier has a region that peers may read."""
        self._transports.register_staged(source)
        self._on_region()

    def lookup(self, key: bytes) -> Stored | None:
        """Where an arena has it."""
        for store in self.stores.values():
            block = store.lookup([key])[0]
            if block is not None:
                return block
        return None

    def with_end(self, block: Stored) -> Stored:
        """A block that an engine has, as one that ends when ours does, or as one that comes now."""
        own = self.lookup(block.key)
        known = own.expires if own is not None else next(iter(self.ends.of([block.key])), 0)
        expires = self.quota.until(block.key, time.monotonic(), known)
        return replace(block, expires=expires) if expires else block

    def inventory(self) -> Iterator[Stored]:
        """One place for each block that we have: arenas first. May be read piece by piece, whatever changes meanwhile."""
        for store in list(self.stores.values()):
            yield from store.inventory()
        yield from self.tiers.inventory()

    def flush(self, region: int, stored: Iterable[Stored] = ()) -> None:
        """Tell what changed in ``region``, removals first; grow it and watch its quarantine as needed."""
        store = self.stores[region]
        came, removed = list(stored), store.take_removed()
        for other in self.stores.values():
            removed += other.take_removed()  # what a tenant's limit pushed out there
        if came or removed:
            self._on_changed(came, removed)
            self._on_published(*self.tiers.published(came, removed))
            self.tiers.stored(came)
        self._watch(region)

    def peer(self, node: str, region: int) -> RegionDescription | None:
        """What we know of a peer's region."""
        description = self.peers.get(node)
        if description is None:
            return None
        return next((candidate for candidate in description.regions if candidate.region == region), None)

    def release(self, owner: int) -> None:
        """A session died: its reservations rest, then are free again."""
        for region, store in self.stores.items():
            store.release(owner, time.monotonic())
            self._watch(region)

    def check(self) -> list[str]:
        """Problems found in any structure; empty when all is well."""
        problems = []
        for region, store in self.stores.items():
            problems += [f"region {region}: {problem}" for problem in store.check()]
        held = ((block.key, region) for region, store in self.stores.items() for block in store.inventory())
        problems += self.quota.check(held)
        return problems + self.tiers.check()

    async def close_tiers(self) -> None:
        """Before `close`, which takes the memory that they read and write."""
        if hasattr(self, "tiers"):
            await self.tiers.close()

    def close(self, unlink: bool) -> None:
        device.remove_stale(self.settings.arena_stem)
        self._expiry.close()
        for task in self._tasks:
            task.cancel()
        self._grower.shutdown()
        for arena in self.arenas.values():
            self._transports.deregister(arena)
            arena.close(unlink=unlink)

    def _open(self, slot_bytes: int) -> Arena:
        settings = self.settings
        capacity = max(settings.arena_bytes, slot_bytes)
        arena = Arena.open(settings.arena_stem, slot_bytes, capacity, settings.arena_chunk_bytes)
        if not arena.available_slots and self._room(arena):
            arena.grow()
        return arena

    def _room(self, arena: Arena) -> bool:
        held = sum(one.available_slots * one.slot_bytes for one in self.arenas.values())
        # A region without any slot gets its first chunk in any case: an engine of a second model must not go without.
        return not arena.available_slots or held + self.settings.arena_chunk_bytes <= self.settings.arena_bytes

    def _watch(self, region: int) -> None:
        store = self.stores[region]
        if store.needs_growth and region not in self._growing and region not in self._exhausted:
            if self._room(self.arenas[region]):
                self._growing.add(region)
                self._spawn(self._grow(region))
            else:
                self._exhausted.add(region)
        self._expiry.watch()

    async def grown(self, region: int) -> None:
        """Wait until the region has slots ahead of need or can't grow: for who fills it faster than memory is cleared."""
        self._watch(region)
        while region in self._growing:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _grow(self, region: int) -> None:
        arena, store = self.arenas[region], self.stores[region]
        try:
            grown = await asyncio.get_running_loop().run_in_executor(self._grower, arena.grow)
        finally:
            self._growing.discard(region)
        if grown:
            store.extend()
            self._watch(region)
        else:
            self._exhausted.add(region)

    def _spawn(self, work: object) -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)  # type: ignore[arg-type]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _step_back() -> None:
    os.setpriority(os.PRIO_PROCESS, 0, GROWTH_NICENESS)  # Linux: of the calling thread
