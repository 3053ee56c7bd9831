"""Blocks on their way into the node's arena: reserve, copy, commit, on one thread, batch by batch.

    save ──> queue ──> a batch of the jobs that wait: Reserve ── copy and checksum each job ── Commit ──> done

Small jobs (a step of decoding completes a block here and there) share a batch: two questions to the node, whatever their
number. Nothing here blocks or raises for what a node does: a save is dropped then. Bulk copies release the GIL.

Threads: `run` is one thread's, the rest may be called from any.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from typing import NamedTuple

import numpy as np

from kvshare import keys, native
from kvshare.errors import KVShareError, Unavailable
from kvshare.messages import Abort, Commit, Done, Reserve, Reserved
from kvshare.session import Session
from kvshare.slots import Region
from kvshare.transport.base import I64, U64, Targets

log = logging.getLogger("kvshare")

SAVE_BATCH_BYTES = 16 << 20  # the unit that a flush may have to wait for: a few milliseconds of copying
SAVE_BATCH_BLOCKS = 512  # keeps a reservation's message small
SAVE_NICENESS = 5  # nobody waits for a save; when processors are scarce the engine's own threads go first
NODE_SECONDS = 2.0  # for the node to answer a reservation; it does nothing slow


class SaveJob:
    """Blocks on their way into the arena. `saved` counts those committed when it is done."""

    def __init__(self, block_keys: list[bytes], sources: Targets) -> None:
        self.keys = block_keys
        self.sources = sources
        self.saved = 0
        self._cancelled = threading.Event()
        self._done = threading.Event()
        self._copying = False
        self._lock = threading.Lock()

    @property
    def bytes(self) -> int:
        return len(self.keys) * self.sources.block_bytes

    @property
    def done(self) -> bool:
        return self._done.is_set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """True when nothing reads the sources any more."""
        return self._done.wait(timeout)

    def cancel(self) -> None:
        """Drop what has not begun. Not a fence: `wait` for the copy under way, never for the node."""
        self._cancelled.set()
        with self._lock:
            if not self._copying:
                self._done.set()

    def begin_copy(self) -> bool:
        """For the mover: False when it was cancelled before."""
        with self._lock:
            self._copying = not self._cancelled.is_set()
            return self._copying

    def end_copy(self) -> None:
        with self._lock:
            self._copying = False
            if self._cancelled.is_set():
                self._done.set()

    def finish(self) -> None:
        self._done.set()


class _Part(NamedTuple):
    """Blocks ``start`` to ``stop`` of a job, as its share of a batch."""

    job: SaveJob
    start: int
    stop: int


class Saver:
    """See the module's docstring."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._jobs: deque[SaveJob] = deque()
        self._waiting = threading.Condition()
        self._queued_bytes = 0
        self._dropped_said = False
        self._closing = False

    def save(self, block_keys: list[bytes], sources: Targets) -> SaveJob:
        """Save blocks (``sources``: where their pages lie, alive until the job is done). Never blocks; beyond
        ``settings.save_bytes_max`` waiting bytes the job is dropped at once."""
        job = SaveJob(block_keys, sources)
        with self._waiting:
            over = self._queued_bytes + job.bytes > self._session.settings.save_bytes_max
            if self._closing or over or not self._session.connected:
                job.cancel()
            else:
                self._queued_bytes += job.bytes
                self._jobs.append(job)
                self._waiting.notify()
        if over and not self._dropped_said:
            self._dropped_said = True
            log.warning("kvshare: blocks come faster than they can be saved; some are skipped (setting 'save_bytes_max')")
        return job

    def run(self) -> None:
        """Carry out saves until `close`."""
        os.setpriority(os.PRIO_PROCESS, 0, SAVE_NICENESS)  # Linux: of the calling thread
        while jobs := self._next():
            try:
                self._save(jobs)
            except KVShareError as error:
                log.info("kvshare: a save was dropped: %s", error)
            finally:
                for job in jobs:
                    job.finish()
        for job in self._jobs:
            job.cancel()

    def close(self) -> None:
        """What has not begun is dropped; `run` returns."""
        with self._waiting:
            self._closing = True
            self._waiting.notify_all()

    def _next(self) -> list[SaveJob]:
        """Jobs that fit into one batch together, or one that may need several; none when closing."""
        with self._waiting:
            while not self._jobs and not self._closing:
                self._waiting.wait()
            jobs: list[SaveJob] = []
            blocks = size = 0
            while self._jobs and not self._closing:
                job = self._jobs[0]
                blocks, size = blocks + len(job.keys), size + job.bytes
                alike = not jobs or job.sources.block_bytes == jobs[0].sources.block_bytes
                if jobs and (not alike or blocks > SAVE_BATCH_BLOCKS or size > SAVE_BATCH_BYTES):
                    break
                jobs.append(self._jobs.popleft())
                self._queued_bytes -= job.bytes
            return jobs

    def _save(self, jobs: list[SaveJob]) -> None:
        step = max(1, min(SAVE_BATCH_BLOCKS, SAVE_BATCH_BYTES // jobs[0].sources.block_bytes))
        if len(jobs) > 1:
            self._save_batch([_Part(job, 0, len(job.keys)) for job in jobs if not job.cancelled])
            return
        (job,) = jobs
        for start in range(0, len(job.keys), step):
            if job.cancelled:
                return
            self._save_batch([_Part(job, start, min(start + step, len(job.keys)))])

    def _save_batch(self, parts: list[_Part]) -> None:
        """Reserve, copy, commit. Counts in each job the blocks that are new to the node."""
        region = self._session.region
        if not parts or region is None or self._closing:
            return
        region.populate()  # what has grown since; nothing to do most times
        number, length = region.region, parts[0].job.sources.block_bytes
        wanted = [key for part in parts for key in part.job.keys[part.start : part.stop]]
        answer = self._session.call(lambda ask: Reserve(ask, number, wanted, length), NODE_SECONDS)
        if not isinstance(answer, Reserved):
            raise Unavailable(str(answer))
        slots, generations = np.array(answer.slots, np.int64), np.array(answer.generations, np.uint64)
        written: list[tuple[SaveJob, I64, U64, list[int]]] = []
        first = 0
        for part in parts:
            mine = slice(first, first + part.stop - part.start)
            first = mine.stop
            chosen = np.flatnonzero(slots[mine] >= 0)
            own_slots, own_generations = slots[mine][chosen], generations[mine][chosen]
            if not len(chosen):
                continue
            if self._session.region is not region or not part.job.begin_copy():
                # Cancelled, or the node was replaced meanwhile: its slots are no longer ours to write.
                self._session.send(Abort(number, own_slots.tolist(), own_generations.tolist()))
                continue
            try:
                written.append((part.job, own_slots, own_generations, _copy(region, own_slots, part, chosen)))
            finally:
                part.job.end_copy()
        self._commit(number, written)

    def _commit(self, region: int, written: list[tuple[SaveJob, I64, U64, list[int]]]) -> None:
        if not written:
            return
        slots = [slot for _, own, _, _ in written for slot in own.tolist()]
        generations = [generation for _, _, own, _ in written for generation in own.tolist()]
        checksums = [checksum for _, _, _, own in written for checksum in own]
        done = self._session.call(lambda ask: Commit(ask, region, slots, generations, checksums), NODE_SECONDS)
        left = done.count if isinstance(done, Done) else 0  # nearly always all of them
        for job, own, _, _ in written:
            job.saved += min(left, len(own))
            left -= min(left, len(own))


def _copy(region: Region, slots: I64, part: _Part, chosen: I64) -> list[int]:
    """Copy the ``chosen`` blocks of a part into ``slots``; returns checksums of what was read: what else writes to a slot by
    mistake makes the block fail."""
    sources = part.job.sources
    addresses = sources.addresses[part.start : part.stop][chosen]
    offsets = np.cumsum(sources.page_bytes) - sources.page_bytes
    bases = np.uint64(region.data_address) + slots.astype(np.uint64) * np.uint64(region.slot_bytes)
    lengths = np.broadcast_to(sources.page_bytes, addresses.shape)
    seeds = np.array(keys.seeds_of(part.job.keys[part.start + i] for i in chosen.tolist()), np.uint64)
    checksums: list[int] = native.copy_blocks(bases[:, None] + offsets[None, :], addresses, lengths, seeds).tolist()
    return checksums
