"""Carrying out a warm plan: several donors in parallel, bounded in bytes and seconds, verified, into the node's own arena.

Who decides what to pull is the directory (`kvshare.plan`); here it is done: reserve slots, read, commit what arrived whole.
A donor that dies costs its share: the directory is asked again for what is still missing, as long as that brings progress.

Threads: all on the node's loop; reads run in the transports' threads.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from kvshare import keys, native
from kvshare.errors import Unavailable
from kvshare.messages import AskPlan, Plan, RegionDescription, Stored, Warm, WarmItem
from kvshare.transport.base import BlockStatus, Completion, ReadRequest, Targets, Transfer

if TYPE_CHECKING:
    from kvshare.link import DirectoryLink
    from kvshare.memory import Memory
    from kvshare.transport.choose import Transports

log = logging.getLogger("kvshare")

BATCH_BYTES = 16 << 20  # of one read: enough to fill a wire, small enough that a dead donor costs little
ROUNDS_MAX = 4
DIRECTORY_SECONDS = 5.0
OWNER = -1  # of our reservations in the store; sessions have numbers from 1


class WarmJob:
    """The warm plan of one family on this node."""

    def __init__(self, family: bytes) -> None:
        self.family = family
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
    """Runs warm plans, one at a time per family."""

    def __init__(self, memory: Memory, link: DirectoryLink, transports: Transports, bytes_max: int, seconds_max: float) -> None:
        self._memory = memory
        self._link = link
        self._transports = transports
        self._bytes_max = bytes_max
        self._seconds_max = seconds_max
        self.jobs: dict[bytes, WarmJob] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._started = asyncio.Event()

    def start(self, family: bytes) -> None:
        """Begin (again) unless the family's plan is under way."""
        job = self.jobs.get(family)
        if job is not None and not job.done.is_set():
            return
        job = self.jobs[family] = WarmJob(family)
        self._started.set()
        self._started = asyncio.Event()
        task = asyncio.get_running_loop().create_task(self._run(job))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

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

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()

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
            left = self._bytes_max - job.bytes_pulled
            plan = await self._link.ask(
                lambda ask, left=left: AskPlan(ask, job.family, left, self._seconds_max),  # type: ignore[misc]
                DIRECTORY_SECONDS,
            )
            if not isinstance(plan, Plan):
                raise Unavailable(f"the directory answered {type(plan).__name__}")
            if turn == 0:
                job.present, job.wanted = plan.present, plan.present + len(plan.items)
            before = job.pulled
            await self._pull(job, plan.items)
            if not plan.items or job.pulled == before:
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
        step = max(1, BATCH_BYTES // region)
        for start in range(0, len(items), step):
            if not await self._pull_batch(job, description, items[start : start + step]):
                return

    async def _pull_batch(self, job: WarmJob, description: RegionDescription, items: list[WarmItem]) -> bool:
        """Returns False when this donor is of no more use."""
        length = items[0].location.length
        own, store = await self._memory.region_for(length)
        await self._memory.grown(own.region)  # else we would evict what we have just pulled
        reserved = store.reserve([item.key for item in items], length, OWNER, time.monotonic())
        chosen = [(item, slot, generation) for item, (slot, generation) in zip(items, reserved, strict=True) if slot >= 0]
        self._memory.flush(own.region)
        if not chosen:
            return True
        slots = np.array([slot for _, slot, _ in chosen], np.int64)
        targets = Targets.strided(own.data_address, own.slot_bytes, slots, length)
        request = ReadRequest(
            np.array([item.location.slot for item, _, _ in chosen], np.int64),
            np.array([item.location.generation for item, _, _ in chosen], np.uint64),
            np.array(keys.seeds_of(item.key for item, _, _ in chosen), np.uint64),
            targets,
            self._memory.settings.transfer_seconds,
        )
        generations = [generation for _, _, generation in chosen]
        transfer = self._transports.read(description, request)
        try:
            completion = await _completed(transfer)
        except asyncio.CancelledError:
            # The transfer's end is the fence: only then may the slots be used again.
            loop = asyncio.get_running_loop()
            transfer.cancel()
            transfer.then(lambda _: _soon(loop, lambda: store.abort(slots.tolist(), generations, OWNER)))
            raise
        good = np.flatnonzero(completion.statuses == BlockStatus.OK)
        bad = np.flatnonzero(completion.statuses != BlockStatus.OK).tolist()
        if bad:
            store.abort([int(slots[i]) for i in bad], [generations[i] for i in bad], OWNER)
            log.info(
                "kvshare: warm: %d of %d blocks of %s failed: %s", len(bad), len(items), description.node, completion.error
            )
        seeds = [int(request.seeds[i]) for i in good.tolist()]
        checksums = await asyncio.to_thread(_checksums, targets.addresses[good, 0], length, seeds)
        stored = store.commit([int(slots[i]) for i in good], [generations[i] for i in good.tolist()], checksums, OWNER)
        self._memory.flush(own.region, stored)
        self._count(job, description.node, stored, length)
        return not bool(
            (completion.statuses == BlockStatus.UNREACHABLE).all() or (completion.statuses == BlockStatus.TIMEOUT).any()
        )

    @staticmethod
    def _count(job: WarmJob, donor: str, stored: Iterable[Stored], length: int) -> None:
        blocks = len(list(stored))
        job.pulled += blocks
        job.bytes_pulled += blocks * length
        if blocks:
            job.donors[donor] += blocks


def _checksums(addresses: np.ndarray, length: int, seeds: list[int]) -> list[int]:
    lengths = np.full((len(seeds), 1), length, np.uint64)
    digests: list[int] = native.checksums(addresses.reshape(-1, 1), lengths, np.array(seeds, np.uint64)).tolist()
    return digests


async def _completed(transfer: Transfer) -> Completion:
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
