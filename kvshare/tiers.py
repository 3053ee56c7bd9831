"""A node's slow tiers: what leaves the arena is not lost, and what is asked for comes back into it.

    arena ──saved, used──> `Demotion` ──> disk regions (one per slot size, as arenas) ──hand-over──> object store
    arena <──────────────  `Promotion` <──────┴──────────────────────────────────────────────────────────┘

Told to the cluster is one location for each key: the arena's where it has the block, else the disk's; sessions hear of the
arena only. What lies in the object store belongs to all and is told by nobody.

A tier that does not answer is left alone until it does (`kvshare.blocking`): its blocks are misses meanwhile. What a former
node left on the disk is read in the background; the node does not wait for it.

Threads: all on the node's loop; reads and writes in the tiers' threads.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from kvshare.blocking import Blocking
from kvshare.config import Settings
from kvshare.cost import Rates
from kvshare.demotion import Demotion, Way
from kvshare.disk import DiskFolder
from kvshare.disk_files import LOCK_SECONDS
from kvshare.disk_tier import DiskTier
from kvshare.errors import ConfigError, ObjectStoreError, RegionError, Unavailable
from kvshare.placement import Admission
from kvshare.places import RegionDescription, Stored
from kvshare.promotion import Promotion, Tier, Want
from kvshare.purge import DISK, OBJECT, Matches, TierPurge
from kvshare.vault import Vault

if TYPE_CHECKING:
    from kvshare.memory import Memory
    from kvshare.object_shelf import ObjectShelf

log = logging.getLogger("kvshare")

Published = Callable[[list[Stored], list[bytes]], None]

LAG_SECONDS = 0.5  # a disk whose oldest operation has been under way for so long is not asked for more
DISK_GRACE_SECONDS = 0.1  # for the first blocks to arrive: a disk that seeks needs a tenth of it
OBJECT_GRACE_SECONDS = 0.5  # a request to a store far away, and a retry
DISK_BATCH_BYTES = 8 << 20  # of a write
OBJECT_WRITERS = 2
OBJECT_PAUSE_SECONDS = 2.0  # for more blocks to come before a segment is written


class Tiers:
    """See the module's docstring. ``on_published(stored, removed)``: what the directory is to hear."""

    vault: Vault  # of the tenants' keys

    def __init__(
        self, memory: Memory, disk: DiskTier | None, objects: ObjectShelf | None, rates: Rates, on_published: Published
    ) -> None:
        settings = memory.settings
        self._memory = memory
        self._on_published = on_published
        self.disk = disk
        self.objects = objects
        self._admission = Admission(settings.disk_admit == "all")
        tiers: list[Tier] = [tier for tier in (disk, objects) if tier is not None]
        self._promotion = Promotion(memory, tiers, rates, settings.disk_threads)
        self._demotions: list[Demotion] = []
        if disk is not None:
            disk.on_changed = self._disk_changed
            way = Way(max(1, settings.disk_threads // 2), DISK_BATCH_BYTES)
            self._demotions.append(Demotion(disk, memory.lookup, way))
        if objects is not None:
            way = Way(OBJECT_WRITERS, settings.object_segment_bytes, OBJECT_PAUSE_SECONDS)
            self._demotions.append(Demotion(objects, self._located, way))

    @staticmethod
    async def open(memory: Memory, rates: Rates, on_published: Published) -> Tiers:
        """What the settings say. A disk that cannot be used is said once, and the node does without.

        Raises:
            ConfigError: another node has the disk's folder, the tenants' keys cannot be had, or the store's URL cannot be used.
        """
        settings = memory.settings
        vault = await asyncio.to_thread(Vault.open, settings.keys_dir)
        folder = await _disk_folder(memory.settings)
        disk = DiskTier(memory, folder, vault) if folder is not None else None
        try:
            objects = await _object_shelf(memory, vault, disk) if settings.object_url else None
        except BaseException:
            if folder is not None:
                folder.close()
            raise
        tiers = Tiers(memory, disk, objects, rates, on_published)
        tiers.vault = vault
        return tiers

    @property
    def enabled(self) -> bool:
        """Is there any slow tier?"""
        return self.disk is not None or self.objects is not None

    def start(self) -> None:
        """Look in the background for what is there already."""
        if self.disk is not None:
            self.disk.start()
        if self.objects is not None:
            self.objects.refresh()

    # --- what is where ------------------------------------------------------------------------------------------------

    def on_disk(self, key: bytes) -> bool:
        """Can it be fetched from our disk?"""
        if self.disk is None or self._bars(key):
            return False
        return bool(self.disk.length(key)) and self.disk.lag() < LAG_SECONDS

    def held(self, keys: Sequence[bytes]) -> list[int]:
        """Bytes of the block under each key that can be fetched; 0 where there is none. Never does I/O."""
        allowed = [not self._bars(key) for key in keys]
        held = [0] * len(keys)
        if self.disk is not None and self.disk.lag() < LAG_SECONDS:
            held = [self.disk.length(key) if may else 0 for key, may in zip(keys, allowed, strict=True)]
        if self.objects is not None and 0 in held:
            stored = self.objects.lengths(keys)
            held = [here or (there if may else 0) for here, there, may in zip(held, stored, allowed, strict=True)]
        return held

    def grace_seconds(self, keys: Sequence[bytes]) -> float:
        """What the first of these may take to arrive from where they are."""
        on_disk = self.disk is not None and all(map(self.disk.length, keys))
        least = DISK_GRACE_SECONDS if on_disk else OBJECT_GRACE_SECONDS
        return max(least, self._promotion.first_seconds(keys, time.monotonic()))

    def published(self, came: list[Stored], removed: list[bytes]) -> tuple[list[Stored], list[bytes]]:
        """What the cluster is to hear of a change of the arena."""
        if self.disk is None or not removed:
            return came, removed
        fallen, gone = [], []
        for key in removed:
            block = self.disk.block(key)
            if block is None:
                gone.append(key)
            elif self._memory.lookup(key) is None:
                fallen.append(block)
        return [*fallen, *came], gone

    def inventory(self) -> Iterator[Stored]:
        """What slow tiers of this node hold and its arena does not."""
        if self.disk is not None:
            yield from (block for block in self.disk.inventory() if self._memory.lookup(block.key) is None)

    def describe(self, node: str, host: str, endpoint: str) -> tuple[RegionDescription, ...]:
        return self.disk.describe(node, host, endpoint) if self.disk is not None else ()

    def _disk_changed(self, came: list[Stored], removed: list[bytes]) -> None:
        """The disk has got blocks, or lost them. Only what the arena does not have is news."""
        lookup = self._memory.lookup
        stored = [block for block in came if lookup(block.key) is None]
        gone = [key for key in removed if lookup(key) is None]
        if stored or gone:
            self._on_published(stored, gone)

    # --- movement -----------------------------------------------------------------------------------------------------

    def opened(self, slot_bytes: int) -> None:
        """The arena has slots of this size now."""
        if self.disk is not None:
            self.disk.want(slot_bytes)

    def stored(self, blocks: Sequence[Stored]) -> None:
        """The arena has got these."""
        if self._demotions and blocks:
            self._demotions[0].offer(self._admission.saved([block.key for block in blocks]))

    def used(self, keys: Sequence[bytes]) -> None:
        """These were looked up and found."""
        if self.disk is not None:
            self.disk.touch(keys)
        if self._demotions:
            self._demotions[0].offer(keys)

    def expected_seconds(self, keys: Sequence[bytes]) -> float:
        """How long `promote` should take, as measured; next to nothing while nothing has been."""
        return self._promotion.seconds(keys, time.monotonic())

    def promote(self, keys: Sequence[bytes], want: Want) -> list[asyncio.Future[bool]]:
        """Bring these into the arena, as long as ``want`` is alive; a future for each, in order: is it there?"""
        return self._promotion.start(keys, want)

    async def keep(self, keys: Iterable[bytes], deadline: float) -> int:
        """Write these blocks of ours to disk and object store until ``deadline`` (`time.monotonic`); returns how many are safe
        in either."""
        wanted = list(keys)
        await asyncio.gather(*(demotion.keep(wanted, deadline) for demotion in self._demotions))
        return sum(map(bool, self.held(wanted)))

    async def purge(self, matches: Matches, shared: bool) -> list[TierPurge]:
        """Remove what matches, and its bytes; with ``shared`` from the object store too. It must be barred meanwhile.

        Raises:
            KVShareError, OSError: something of it may be left; do it again.
        """
        done = []
        if self.disk is not None:
            done.append(TierPurge(DISK, *await self.disk.purge(matches)))
        if self.objects is not None:
            await self.objects.settle()
            if shared:
                done.append(TierPurge(OBJECT, *await self.objects.purge(matches)))
            else:
                await self.objects.forget(matches)
        return done

    def _located(self, key: bytes) -> Stored | None:
        """Where memory or disk has it."""
        block = self._memory.lookup(key)
        return block if block is not None or self.disk is None else self.disk.block(key)

    def _bars(self, key: bytes) -> bool:
        return self._memory.gate is not None and self._memory.gate.bars(key)

    # --- life ---------------------------------------------------------------------------------------------------------

    def paths(self, rates: Rates, now: float) -> dict[str, str]:
        """The tiers, and how fast they were, as `kvshare status` shows regions that are read."""
        told = {}
        for tier in (self.disk, self.objects):
            if tier is not None:
                rate = rates.rate(tier.source, now)
                told[" ".join(tier.source)] = f"itself, {rate / 1e6:.0f} MB/s" if rate else "itself"
        return told

    @property
    def counters(self) -> dict[str, int]:
        counters: Counter[str] = Counter(self._promotion.counters if self.enabled else {})
        for part in (self.disk, self.objects, *self._demotions):
            if part is not None:
                counters.update(part.counters)
        return dict(counters)

    def check(self) -> list[str]:
        """Problems found; empty when all is well."""
        return self.disk.check() if self.disk is not None else []

    async def close(self) -> None:
        """When this returns nothing of ours is under way, but what a device that does not answer holds up."""
        await self._promotion.close()
        for part in (*self._demotions, self.objects, self.disk):
            if part is not None:
                await part.close()


async def _disk_folder(settings: Settings) -> DiskFolder | None:
    """Raises ConfigError."""
    if not settings.disk_dir:
        return None
    patience = Blocking("disk", "disk_seconds", 1, LOCK_SECONDS + settings.disk_seconds)
    try:
        return await patience.run(partial(DiskFolder.open, settings.disk_dir, settings.cluster))
    except (RegionError, Unavailable) as error:
        if isinstance(error.__cause__, BlockingIOError):
            raise ConfigError(f"setting 'disk_dir' cannot be {settings.disk_dir!r}: {error}.") from error
        log.warning("kvshare: no blocks are kept on disk: %s", error)
        return None
    finally:
        await asyncio.to_thread(patience.close)


async def _object_shelf(memory: Memory, vault: Vault, disk: DiskTier | None) -> ObjectShelf:
    """Raises ConfigError."""
    from kvshare.object_shelf import ObjectShelf  # late: its library is needed by nobody else
    from kvshare.objectstore import ObjectTier

    settings = memory.settings
    how = (settings.object_url, settings.cluster, vault, settings.object_segment_bytes, settings.object_seconds)
    try:
        return ObjectShelf(memory, await asyncio.to_thread(ObjectTier.open, *how), disk)
    except ObjectStoreError as error:
        raise ConfigError(f"setting 'object_url' cannot be {settings.object_url!r}: {error}.") from error
