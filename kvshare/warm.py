"""Carrying out a warm plan: several donors in parallel, bounded in bytes and seconds, verified, into the node's own arena.

Who decides what to pull is the directory (`kvshare.plan`); here it is done: reserve slots, read, commit what arrived whole.
A donor that dies costs its share: the directory is asked again for what is still missing, as long as that brings progress.
Joiners that ask together may be given the same blocks by one broadcast (`kvshare.warm_group`), once; what that leaves
undone is read singly like all else.

Threads: all on the node's loop; reads run in the transports' threads.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kvshare import keys, native
from kvshare.cost import Rates
from kvshare.device import is_of
from kvshare.errors import KVShareError, Unavailable
from kvshare.messages import Warm
from kvshare.places import DEVICE, GroupPlan, Stored, WarmItem
from kvshare.store import NO_SLOT
from kvshare.transport.base import BlockStatus, Completion, ReadRequest, Targets, Transfer
from kvshare.warm_group import Groups, batch_blocks

if TYPE_CHECKING:
    from kvshare.memory import Memory
    from kvshare.shards import Shards
    from kvshare.slots import Arena
    from kvshare.store import Store
    from kvshare.transport.choose import Transports

log = logging.getLogger("kvshare")

BATCH_BYTES = 16 << 20  # of one read: enough to fill a wire, small enough that a dead donor costs little
TAKE_BYTES = 4 << 20  # of one read of a node that leaves: what has not arrived whole when the time is over is lost
ROUNDS_MAX = 4
DIRECTORY_SECONDS = 5.0
OWNER = -1  # of our reservations in the store; sessions have numbers from 1

Read = Callable[[ReadRequest, npt.NDArray[np.int64]], Transfer]  # the second: which of a batch's items these are


class WarmJob:
    """The warm plan of one family on this node; or what is taken of a node that leaves: then nothing is pushed out for it."""

    def __init__(self, family: bytes, tenant: bytes = keys.NO_TENANT, *, taking: bool = False) -> None:
        self.family, self.tenant = family, tenant
        self.evicts = not taking
        self.batch_bytes = TAKE_BYTES if taking else BATCH_BYTES
        self.done = asyncio.Event()
        self.wanted = self.present = self.pulled = self.bytes_pulled = 0
        self.donors: dict[str, int] = defaultdict(int)
        self._began = time.monotonic()
        self._seconds = 0.0

    def state(self, ask: int) -> Warm:
        seconds = self._seconds if self.done.is_set() else time.monotonic() - self._began
        done = self.done.is_set()
        return Warm(ask, done, self.wanted, self.present, self.pulled, self.bytes_pulled, seconds, dict(self.donors))

    def finish(self) -> None:
        self._seconds = time.monotonic() - self._began
        self.done.set()


class Warmer:
    """Runs warm plans, one at a time per family. ``rates`` learns from its single reads."""

    def __init__(
        self,
        memory: Memory,
        link: Shards,
        transports: Transports,
        rates: Rates,
        groups: Groups,
        bytes_max: int,
        seconds_max: float,
    ) -> None:
        self._memory = memory
        self._link = link
        self._transports = transports
        self._rates = rates
        self._groups = groups
        self._bytes_max = bytes_max
        self._seconds_max = seconds_max
        self.jobs: dict[bytes, WarmJob] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._started = asyncio.Event()

    def start(self, family: bytes, tenant: bytes) -> None:
        """Begin (again) unless the family's plan is under way; what is this tenant's first."""
        job = self.jobs.get(family)
        if job is not None and not job.done.is_set():
            return
        job = self.jobs[family] = WarmJob(family, tenant)
        self._started.set()
        self._started = asyncio.Event()
        task = asyncio.get_running_loop().create_task(self._run(job))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def take(self, items: list[WarmItem], seconds: float) -> None:
        """Blocks of a node that leaves: into free room only, what comes within ``seconds``. Raises KVShareError, OSError."""
        try:
            async with asyncio.timeout(seconds):
                await self._pull(WarmJob(b"", taking=True), items)
        except TimeoutError:
            pass  # the directory has others for the rest

    async def wait(self, ask: int, family: bytes, seconds: float) -> Warm:
        """State of one family's plan, or the sum over all (empty family), after at most ``seconds``."""
        try:
            async with asyncio.timeout(max(0.0, seconds)):
                while not self._chosen(family):
                    # No engine of this family yet: not warm.
                    await self._started.wait()
                for job in self._chosen(family):
                    await job.done.wait()
        except TimeoutError:
            pass
        return _total(ask, [job.state(ask) for job in self._chosen(family)])

    def _chosen(self, family: bytes) -> list[WarmJob]:
        return [job for name, job in self.jobs.items() if family in (b"", name)]

    async def close(self) -> None:
        """When this returns, only transfers may still write to the arena."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, job: WarmJob) -> None:
        try:
            if self._bytes_max > 0 and self._seconds_max > 0:
                async with asyncio.timeout(self._seconds_max):
                    await self._link.ready()
                    await self._pull_rounds(job)
        except TimeoutError:
            log.warning("kvshare: warm-up ended at its limit of %s s (setting 'warm_seconds')", self._seconds_max)
        except Unavailable as error:
            log.info("kvshare: no warm plan: %s", error)
        finally:
            job.finish()
            log.info(
                "kvshare: warm: %d wanted, %d here, %d pulled from %s", job.wanted, job.present, job.pulled, dict(job.donors)
            )

    async def _pull_rounds(self, job: WarmJob) -> None:
        for turn in range(ROUNDS_MAX):
            left, together = self._bytes_max - job.bytes_pulled, turn == 0 and self._groups.capable
            patience = DIRECTORY_SECONDS + together * self._memory.settings.warm_gather_seconds
            rates = self._rates.of_nodes(time.monotonic())
            plan = await self._link.plan(job.family, job.tenant, left, self._seconds_max, together, rates, patience)
            if turn == 0:
                job.present, job.wanted = plan.present, plan.present + len(plan.items)
            before = job.pulled
            if plan.group is None:
                await self._pull(job, plan.items)
            else:
                await self._pull_group(job, plan.group, plan.items)
            if not plan.items or (job.pulled == before and plan.group is None):
                return
            # Let our own publishes reach the directory before it plans again.
            await asyncio.sleep(2 * self._memory.settings.publish_seconds)

    async def _pull(self, job: WarmJob, items: list[WarmItem]) -> None:
        by_source: dict[tuple[str, int, int], list[WarmItem]] = defaultdict(list)
        for item in items:
            where = item.location
            by_source[(where.node, where.region, where.length)].append(item)
        await asyncio.gather(*(self._pull_from(job, node, region, blocks) for (node, region, _), blocks in by_source.items()))

    async def _pull_from(self, job: WarmJob, node: str, region: int, items: list[WarmItem]) -> None:
        description = self._memory.peer(node, region)
        if description is None:
            return
        if description.kind == DEVICE:
            items = [item for item in items if is_of(item.location.generation, item.key)]
        step = max(1, job.batch_bytes // region)
        for start in range(0, len(items), step):
            batch = items[start : start + step]
            completion = await self._pull_batch(
                job, node, batch, lambda request, _: self._transports.read(description, request)
            )
            if completion is not None:
                rate = completion.bytes, completion.seconds
                self._rates.observe((description.node, description.kind), *rate, time.monotonic())
                if _of_no_more_use(completion):
                    return

    async def _pull_group(self, job: WarmJob, plan: GroupPlan, items: list[WarmItem]) -> None:
        """Take part in a group to its end, or to its failure."""
        try:
            part = await self._groups.join(plan)
        except KVShareError as error:
            log.info("kvshare: warm: no group: %s", error)
            return
        try:
            step = batch_blocks(items)
            for start in range(0, len(items), step):
                batch = items[start : start + step]
                read = partial(part.read, blocks=len(batch))
                completion = await self._pull_batch(job, batch[0].location.node, batch, read, awaited=True)
                if completion is not None and _of_no_more_use(completion):
                    return
        finally:
            part.close()

    async def _pull_batch(
        self, job: WarmJob, donor: str, items: list[WarmItem], read: Read, awaited: bool = False
    ) -> Completion | None:
        """Returns None when nothing was to be read, since all is here or there is no room; ``awaited``: read in any case."""
        length = items[0].location.length
        own, store = await self._memory.region_for(length)
        for item in items:
            self._memory.ends.told(item.key, item.location.expires)
        reserved = await self._reserve(own, store, [item.key for item in items], length, job.evicts)
        positions = np.array([i for i, (slot, _) in enumerate(reserved) if slot >= 0], np.int64)
        if not len(positions) and not awaited:
            return None
        chosen = [items[i] for i in positions]
        slots = [reserved[i][0] for i in positions]
        generations = [reserved[i][1] for i in positions]
        targets = Targets.strided(own.data_address, own.slot_bytes, np.array(slots, np.int64), length)
        request = ReadRequest(
            np.array([item.location.slot for item in chosen], np.int64),
            np.array([item.location.generation for item in chosen], np.uint64),
            np.array(keys.seeds_of(item.key for item in chosen), np.uint64),
            targets,
            self._memory.settings.transfer_seconds,
        )
        transfer = read(request, positions)
        try:
            completion = await completed(transfer)
        except asyncio.CancelledError:
            # The transfer's end is the fence: only then may the slots be used again.
            loop = asyncio.get_running_loop()
            transfer.cancel()
            transfer.then(lambda _: _soon(loop, lambda: store.abort(slots, generations, OWNER)))
            raise
        good = np.flatnonzero(completion.statuses == BlockStatus.OK).tolist()
        bad = np.flatnonzero(completion.statuses != BlockStatus.OK).tolist()
        if bad:
            store.abort([slots[i] for i in bad], [generations[i] for i in bad], OWNER)
            log.info("kvshare: warm: %d of %d blocks of %s failed: %s", len(bad), len(items), donor, completion.error)
        seeds = [int(request.seeds[i]) for i in good]
        summing = asyncio.ensure_future(asyncio.to_thread(_checksums, targets.addresses[good, 0], length, seeds))
        try:
            checksums = await asyncio.shield(summing)
        except asyncio.CancelledError:
            await asyncio.wait([summing])  # it reads the slots
            store.abort([slots[i] for i in good], [generations[i] for i in good], OWNER)
            raise
        stored = store.commit([slots[i] for i in good], [generations[i] for i in good], checksums, OWNER)
        self._memory.flush(own.region, stored)
        self._count(job, donor, stored, length)
        return completion

    async def _reserve(self, own: Arena, store: Store, wanted: list[bytes], length: int, evicts: bool) -> list[tuple[int, int]]:
        """As `Store.reserve`, piece by piece: only so much room is made ahead of need, and without room we would evict what we
        have just pulled. Not ``evicts``: only what is free."""
        reserved: list[tuple[int, int]] = []
        step = max(1, BATCH_BYTES // own.slot_bytes)
        try:
            for start in range(0, len(wanted), step):
                await self._memory.grown(own.region)
                piece = wanted[start : start + step]
                room = len(piece) if evicts else min(len(piece), store.free_slots)
                reserved += store.reserve(piece[:room], length, OWNER, time.monotonic(), self._memory.ends.of(piece[:room]))
                reserved += [NO_SLOT] * (len(piece) - room)
                self._memory.flush(own.region)
        except asyncio.CancelledError:
            taken = [(slot, generation) for slot, generation in reserved if slot >= 0]
            store.abort([slot for slot, _ in taken], [generation for _, generation in taken], OWNER)
            raise
        return reserved

    @staticmethod
    def _count(job: WarmJob, donor: str, stored: Iterable[Stored], length: int) -> None:
        blocks = len(list(stored))
        job.pulled += blocks
        job.bytes_pulled += blocks * length
        if blocks:
            job.donors[donor] += blocks


def _of_no_more_use(completion: Completion) -> bool:
    """Has the donor died or hung?"""
    statuses = completion.statuses
    return bool(len(statuses) and ((statuses == BlockStatus.UNREACHABLE).all() or (statuses == BlockStatus.TIMEOUT).any()))


def _checksums(addresses: np.ndarray, length: int, seeds: list[int]) -> list[int]:
    lengths = np.full((len(seeds), 1), length, np.uint64)
    digests: list[int] = native.checksums(addresses.reshape(-1, 1), lengths, np.array(seeds, np.uint64)).tolist()
    return digests


async def completed(transfer: Transfer) -> Completion:
    """Wait on the running loop. A waiter that is cancelled does not cancel the transfer."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Completion] = loop.create_future()

    def finish(completion: Completion) -> None:
        if not future.done():
            future.set_result(completion)

    transfer.then(lambda completion: _soon(loop, lambda: finish(completion)))
    return await future


def _soon(loop: asyncio.AbstractEventLoop, action: object) -> None:
    try:
        loop.call_soon_threadsafe(action)  # type: ignore[arg-type]
    except RuntimeError:
        pass  # the node stopped: nobody waits any more


def _total(ask: int, states: list[Warm]) -> Warm:
    donors: dict[str, int] = defaultdict(int)
    for state in states:
        for donor, blocks in state.donors.items():
            donors[donor] += blocks
    return Warm(
        ask,
        bool(states) and all(state.done for state in states),
        sum(state.wanted for state in states),
        sum(state.present for state in states),
        sum(state.pulled for state in states),
        sum(state.bytes_pulled for state in states),
        max((state.seconds for state in states), default=0.0),
        dict(donors),
    )
