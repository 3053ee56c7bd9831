"""The half of a session that moves bytes: loads blocks into any memory, saves blocks into the node's arena.

    load(plan, targets) ──> one read per source region over `Transports` ──> LoadJob (a status per block of the plan)
    save(keys, sources) ──> reserve ── copy ── checksum ── commit, on one thread, batch by batch ──> SaveJob

Neither blocks nor raises for what a node or a peer does: a load then completes with failed blocks, a save drops. Bulk
copies are single calls that release the GIL.

Threads: `kvshare-load` submits reads (copies run in the transports' threads), `kvshare-save` carries out saves. Both start
with the processor affinity given, since an engine pins the thread that makes us and its children would inherit that.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial

import numpy as np

from kvshare import keys, native
from kvshare.errors import KVShareError, Unavailable
from kvshare.loading import LoadPlan, SourceRead
from kvshare.messages import Abort, Commit, Done, RegionDescription, Reserve, Reserved
from kvshare.session import Session
from kvshare.slots import Region
from kvshare.transport.base import I64, U64, BlockStatus, Completion, ReadRequest, Targets, Transfer
from kvshare.transport.choose import Transports, host_id
from kvshare.transport.shm import ShmTransport

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


class LoadJob(Transfer):
    """A load of a whole plan, made of one transfer per source region."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.parts: list[Transfer] = []
        self.statuses = np.full(blocks, BlockStatus.UNREACHABLE, np.uint8)

    def cancel(self) -> None:
        super().cancel()
        for part in list(self.parts):
            part.cancel()


class Mover:
    """See the module's docstring. ``affinity``: processors its threads may use; None leaves them as they are."""

    def __init__(self, session: Session, affinity: set[int] | None = None) -> None:
        self._session = session
        self._affinity = affinity
        settings = session.settings
        self._transports = Transports(settings, host_id(), serve=False)
        # The own node is read from the session's mapping whatever ways to peers are enabled: it is there, and warm.
        self._own = ShmTransport(host_id())
        self._own_region: Region | None = None
        self._loads: queue.SimpleQueue[tuple[LoadPlan, Targets, LoadJob] | None] = queue.SimpleQueue()
        self._saves: deque[SaveJob] = deque()
        self._saving = threading.Condition()
        self._queued_bytes = 0
        self._closing = False
        self._dropped_said = False
        self._threads = [
            threading.Thread(target=self._run, args=(self._load_loop,), name="kvshare-load", daemon=True),
            threading.Thread(target=self._run, args=(self._save_loop,), name="kvshare-save", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    # --- loads --------------------------------------------------------------------------------------------------------

    def load(self, plan: LoadPlan, targets: Targets) -> LoadJob:
        """Read the plan's blocks into ``targets`` (block i of the plan to block i). Completes in bounded time."""
        job = LoadJob(len(plan))
        if self._closing:
            job.complete(Completion(job.statuses, 0, 0.0, "the mover is closed"))
        else:
            self._loads.put((plan, targets, job))
        return job

    def _load_loop(self) -> None:
        while (item := self._loads.get()) is not None:
            plan, targets, job = item
            try:
                self._start_load(plan, targets, job)
            except Exception as error:  # ours or theirs: the blocks are misses, and the reason is said
                log.warning("kvshare: a load failed: %s: %s", type(error).__name__, error)
                job.complete(Completion(job.statuses, 0, 0.0, str(error)))

    def _start_load(self, plan: LoadPlan, targets: Targets, job: LoadJob) -> None:
        began = time.monotonic()
        seeds = np.array(keys.seeds_of(plan.keys), np.uint64)
        lock, left, moved, errors = threading.Lock(), len(plan.reads), 0, []

        def finished(read: SourceRead, completion: Completion) -> None:
            nonlocal left, moved
            with lock:
                job.statuses[read.positions] = completion.statuses
                moved += completion.bytes
                if completion.error:
                    errors.append(f"{read.description.node}: {completion.error}")
                left -= 1
                last = left == 0
            self._report_corrupt(read, completion)
            if last:
                job.complete(Completion(job.statuses, moved, time.monotonic() - began, "; ".join(errors)))

        if not plan.reads:
            job.complete(Completion(job.statuses, 0, 0.0, "no source"))
        # All requests before the first read: what can go wrong must do so while nothing writes to the targets yet.
        requests = [
            ReadRequest(
                read.slots,
                read.generations,
                seeds[read.positions],
                Targets(targets.addresses[read.positions], targets.page_bytes),
                self._session.settings.transfer_seconds,
            )
            for read in plan.reads
        ]
        for read, request in zip(plan.reads, requests, strict=True):
            transfer = self._read(read.description, request)
            job.parts.append(transfer)
            if job.cancelled:
                transfer.cancel()
            transfer.then(partial(finished, read))

    def _read(self, description: RegionDescription, request: ReadRequest) -> Transfer:
        own, region = self._session.description, self._session.region
        if own is None or region is None or (description.node, description.table_path) != (own.node, own.table_path):
            return self._transports.read(description, request)
        if region is not self._own_region:
            self._own.register(region)
            self._own_region = region
        return self._own.read(description, request)

    def _report_corrupt(self, read: SourceRead, completion: Completion) -> None:
        corrupt = np.flatnonzero(completion.statuses == BlockStatus.CORRUPT)
        if not len(corrupt):
            return
        log.warning("kvshare: %d blocks of node %s failed their checksum; recomputed", len(corrupt), read.description.node)
        node = self._session.node
        if node is not None and read.description.node == node.node:
            self._session.quarantine(read.slots[corrupt], read.generations[corrupt])

    # --- saves --------------------------------------------------------------------------------------------------------

    def save(self, block_keys: list[bytes], sources: Targets) -> SaveJob:
        """Save blocks (``sources``: where their pages lie, alive until the job is done). Never blocks; beyond
        ``settings.save_bytes_max`` waiting bytes the job is dropped at once."""
        job = SaveJob(block_keys, sources)
        with self._saving:
            over = self._queued_bytes + job.bytes > self._session.settings.save_bytes_max
            if self._closing or over or not self._session.connected:
                job.cancel()
            else:
                self._queued_bytes += job.bytes
                self._saves.append(job)
                self._saving.notify()
        if over and not self._dropped_said:
            self._dropped_said = True
            log.warning("kvshare: blocks come faster than they can be saved; some are skipped (setting 'save_bytes_max')")
        return job

    def _save_loop(self) -> None:
        os.setpriority(os.PRIO_PROCESS, 0, SAVE_NICENESS)  # Linux: of the calling thread
        while True:
            with self._saving:
                while not self._saves and not self._closing:
                    self._saving.wait()
                if self._closing:
                    break
                job = self._saves.popleft()
                self._queued_bytes -= job.bytes
            if not job.cancelled:
                try:
                    self._save(job)
                except KVShareError as error:
                    log.info("kvshare: a save was dropped: %s", error)
                finally:
                    job.finish()
        for job in self._saves:
            job.cancel()

    def _save(self, job: SaveJob) -> None:
        step = max(1, min(SAVE_BATCH_BLOCKS, SAVE_BATCH_BYTES // job.sources.block_bytes))
        for start in range(0, len(job.keys), step):
            region = self._session.region
            if job.cancelled or region is None or self._closing:
                return
            region.populate()  # what has grown since; nothing to do most times
            batch = Targets(job.sources.addresses[start : start + step], job.sources.page_bytes)
            job.saved += self._save_batch(job, region, job.keys[start : start + step], batch)

    def _save_batch(self, job: SaveJob, region: Region, block_keys: list[bytes], sources: Targets) -> int:
        """Reserve, copy, commit. Returns the blocks that are new to the node."""
        number = region.region
        answer = self._session.call(lambda ask: Reserve(ask, number, block_keys, sources.block_bytes), NODE_SECONDS)
        if not isinstance(answer, Reserved):
            raise Unavailable(str(answer))
        slots = np.array(answer.slots, np.int64)
        chosen = np.flatnonzero(slots >= 0)
        if not len(chosen):
            return 0
        slots, generations = slots[chosen], [answer.generations[i] for i in chosen.tolist()]
        chosen_keys = [block_keys[i] for i in chosen.tolist()]
        if self._session.region is not region or not job.begin_copy():
            # Cancelled, or the node was replaced meanwhile: its slots are no longer ours to write.
            self._session.send(Abort(number, slots.tolist(), generations))
            return 0
        try:
            checksums = self._copy(region, slots, sources.addresses[chosen], sources.page_bytes, chosen_keys)
        finally:
            job.end_copy()
        done = self._session.call(lambda ask: Commit(ask, number, slots.tolist(), generations, checksums), NODE_SECONDS)
        return done.count if isinstance(done, Done) else 0

    @staticmethod
    def _copy(region: Region, slots: I64, addresses: U64, page_bytes: U64, block_keys: list[bytes]) -> list[int]:
        """Copy each block's pages into its slot; returns checksums of what was read: whatever else writes to the slot by
        mistake makes the block fail."""
        offsets = np.cumsum(page_bytes) - page_bytes
        bases = np.uint64(region.data_address) + slots.astype(np.uint64) * np.uint64(region.slot_bytes)
        lengths = np.broadcast_to(page_bytes, addresses.shape)
        seeds = np.array(keys.seeds_of(block_keys), np.uint64)
        checksums: list[int] = native.copy_blocks(bases[:, None] + offsets[None, :], addresses, lengths, seeds).tolist()
        return checksums

    # --- life ---------------------------------------------------------------------------------------------------------

    def _run(self, loop: Callable[[], None]) -> None:
        if self._affinity is not None:
            try:
                os.sched_setaffinity(0, self._affinity)  # 0: the calling thread
            except OSError as error:
                log.info("kvshare: cannot leave the engine's processors: %s", error)
        loop()

    def close(self) -> None:
        """End both threads and the transports; idempotent. Running loads end as cancelled."""
        with self._saving:
            if self._closing:
                return
            self._closing = True
            self._saving.notify_all()
        self._loads.put(None)
        self._transports.close()
        self._own.close()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=5.0)
