"""Promotion: blocks from a slow tier into the arena, in the order of their chain, in batches, several at once.

    start(keys) ─> batches of `BATCH_BYTES` ─> reserve arena slots ─> read into them (a thread) ─> verified ─> commit ─> told

Who asks for a key that is on its way shares its read. A batch begins only while somebody still wants one of its blocks. A block
that fails is a miss, and its tier hears of it. A read that its tier does not end keeps its arena slots reserved until it does:
something may yet write to them.

Threads: all on the node's loop; reads run in the tiers' threads.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from kvshare.cost import JITTER, LATENCY_SECONDS, Meter, Rates
from kvshare.errors import KVShareError, Unavailable
from kvshare.loading import Source
from kvshare.region import Region
from kvshare.store import Store
from kvshare.transport.base import BlockStatus

if TYPE_CHECKING:
    from kvshare.memory import Memory

log = logging.getLogger("kvshare")

BATCH_BYTES = 4 << 20  # large enough for a disk's full rate, small enough that the first blocks are here soon
OWNER = -2  # of our reservations in the arena; -1 is `kvshare.warm`'s, sessions have numbers from 1
ARENA_SHARE = 2  # a chain may take one in so many bytes of the arena: its tail must not push out its head

U64 = npt.NDArray[np.uint64]


class Tier(Protocol):
    """What promotion needs of a slow tier. All on the loop."""

    source: Source  # what its rate is known under

    def length(self, key: bytes) -> int:
        """Bytes of the block under this key; 0 where it is not held, or cannot be read now."""

    async def read(
        self, keys: Sequence[bytes], addresses: U64, length: int, late: Callable[[], None]
    ) -> tuple[npt.NDArray[np.uint8], U64]:
        """Read blocks to ``addresses`` (uint64 [n], ``length`` bytes each) and verify them. Returns `BlockStatus` (uint8 [n])
        and checksums (uint64 [n]) of those that are OK. Blocks that failed are dealt with.

        Raises:
            Unavailable: given up; ``late`` is called once nothing writes there any more. asyncio.CancelledError: the same.
            OSError, KVShareError: nothing writes there any more.
        """

    def expires(self, key: bytes) -> int:
        """Second since 2020 when the block of a held key ends; 0: no end."""


class Want:
    """Somebody's interest in blocks; over after `end`."""

    def __init__(self) -> None:
        self.alive = True

    def end(self) -> None:
        self.alive = False


class Promotion:
    """See the module's docstring. ``tiers``: in order of preference; ``rates`` learns from reads; ``in_flight``: batches."""

    def __init__(self, memory: Memory, tiers: Sequence[Tier], rates: Rates, in_flight: int) -> None:
        self._memory = memory
        self._tiers = tiers
        self._rates = rates
        self._meter = Meter()
        self._in_flight_max = in_flight
        self._in_flight = asyncio.Semaphore(in_flight)
        self._running: dict[bytes, asyncio.Future[bool]] = {}
        self._wants: dict[bytes, list[Want]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.counters = {"promoted_blocks": 0, "promoted_bytes": 0, "promotion_failed": 0}

    def start(self, keys: Sequence[bytes], want: Want) -> list[asyncio.Future[bool]]:
        """Bring ``keys`` into the arena; a future for each, in order: is it there? They never raise."""
        loop = asyncio.get_running_loop()
        futures, fresh = [], []
        room = self._memory.settings.arena_bytes // ARENA_SHARE
        for key in keys:
            tier = self._tier(key)
            room -= tier.length(key) if tier is not None else 0
            if key not in self._running and room < 0:
                futures.append(loop.create_future())
                futures[-1].set_result(False)
                continue
            if key not in self._running:
                self._running[key] = loop.create_future()
                self._wants[key] = []
                fresh.append(key)
            self._wants[key].append(want)
            futures.append(self._running[key])
        for tier, batch, length in self._batches(fresh):
            task = loop.create_task(self._carry(tier, batch, length))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return futures

    def seconds(self, keys: Sequence[bytes], now: float) -> float:
        """How long it should take by what has been measured; next to nothing where nothing was."""
        total = LATENCY_SECONDS
        for key in keys:
            tier = self._tier(key)
            rate = self._rates.rate(tier.source, now) if tier is not None else 0.0
            total += tier.length(key) / rate if tier is not None and rate else 0.0
        return total

    def first_seconds(self, keys: Sequence[bytes], now: float) -> float:
        """How long it should take until the first of ``keys`` is here, with all that is read beside it; 0: unknown."""
        tier = self._tier(keys[0])
        rate = self._rates.rate(tier.source, now) if tier is not None else 0.0
        return JITTER * self._in_flight_max * BATCH_BYTES / rate if rate else 0.0

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _tier(self, key: bytes) -> Tier | None:
        """Where it is read from; None: nobody has it (any more)."""
        return next((tier for tier in self._tiers if tier.length(key)), None)

    def _batches(self, keys: Sequence[bytes]) -> Iterator[tuple[Tier | None, list[bytes], int]]:
        """Neighbours of one tier and length."""
        batch: list[bytes] = []
        alike: tuple[Tier | None, int] = (None, 0)
        for key in keys:
            tier = self._tier(key)
            kind = (tier, tier.length(key) if tier is not None else 0)
            if batch and (kind != alike or (len(batch) + 1) * kind[1] > BATCH_BYTES):
                yield alike[0], batch, alike[1]
                batch = []
            alike = kind
            batch.append(key)
        if batch:
            yield alike[0], batch, alike[1]

    async def _carry(self, tier: Tier | None, keys: list[bytes], length: int) -> None:
        try:
            async with self._in_flight:
                wanted = [key for key in keys if any(want.alive for want in self._wants[key])]
                if tier is not None and wanted:
                    await self._bring(tier, wanted, length)
        except Unavailable as error:
            log.debug("kvshare: %s", error)
        except (KVShareError, OSError) as error:
            log.info("kvshare: blocks could not be read from %s: %s", tier.source[1] if tier is not None else "", error)
        finally:
            for key in keys:
                del self._wants[key]
                self._running.pop(key).set_result(self._memory.lookup(key) is not None)

    async def _bring(self, tier: Tier, keys: list[bytes], length: int) -> None:
        memory = self._memory
        arena, store = await memory.region_for(length)
        await memory.grown(arena.region)
        pairs = store.reserve(keys, length, OWNER, time.monotonic(), [tier.expires(key) for key in keys])
        memory.flush(arena.region)
        chosen = [i for i, (slot, _) in enumerate(pairs) if slot >= 0]
        if not chosen:
            return
        slots, generations = [pairs[i][0] for i in chosen], [pairs[i][1] for i in chosen]
        addresses = np.uint64(arena.data_address) + np.array(slots, np.uint64) * np.uint64(arena.slot_bytes)
        mine = [keys[i] for i in chosen]

        def release() -> None:
            store.abort(slots, generations, OWNER)

        self._meter.began(tier.source, time.monotonic())
        moved = 0
        try:
            statuses, checksums = await tier.read(mine, addresses, length, release)
            moved = int(np.count_nonzero(statuses == BlockStatus.OK)) * length
        except (Unavailable, asyncio.CancelledError):
            raise
        except BaseException:
            release()
            raise
        finally:
            now = time.monotonic()
            measured = self._meter.ended(tier.source, moved, now)
            self._rates.observe(tier.source, measured.bytes, measured.seconds, now)
        self._commit(arena, store, slots, generations, statuses, checksums)

    def _commit(
        self,
        arena: Region,
        store: Store,
        slots: list[int],
        generations: list[int],
        statuses: npt.NDArray[np.uint8],
        checksums: U64,
    ) -> None:
        good = np.flatnonzero(statuses == BlockStatus.OK).tolist()
        bad = np.flatnonzero(statuses != BlockStatus.OK).tolist()
        store.abort([slots[i] for i in bad], [generations[i] for i in bad], OWNER)
        stored = store.commit(
            [slots[i] for i in good], [generations[i] for i in good], [int(checksums[i]) for i in good], OWNER
        )
        self._memory.flush(arena.region, stored)
        self.counters["promoted_blocks"] += len(stored)
        self.counters["promoted_bytes"] += sum(block.length for block in stored)
        self.counters["promotion_failed"] += len(bad)
