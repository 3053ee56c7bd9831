"""The half of a session that moves bytes: loads blocks into any memory, saves blocks into the node's arena.

    load(plan, targets) ──> `Pull`: reads of each source region over `Transports` ──> a status per block of the plan
    save(keys, sources) ──> `Saver`: reserve, copy, checksum, commit, batch by batch ──> SaveJob

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

from kvshare.cost import Meter, Rates
from kvshare.loading import LoadPlan, Measured, Source, SourceRead
from kvshare.messages import Missed
from kvshare.places import RegionDescription
from kvshare.pull import Pull, Reader
from kvshare.saving import SaveJob, Saver
from kvshare.session import Session
from kvshare.slots import Region
from kvshare.transport.base import I64, ReadRequest, Targets, Transfer
from kvshare.transport.choose import Transports, host_id
from kvshare.transport.shm import ShmTransport

log = logging.getLogger("kvshare")

MEASURED_MAX = 1024  # kept for whoever asks; not everybody does


class Mover(Reader):
    """See the module's docstring. ``affinity``: processors its threads may use; None leaves them as they are."""

    def __init__(self, session: Session, affinity: set[int] | None = None) -> None:
        self._session = session
        self._affinity = affinity
        settings = session.settings
        self.transports = Transports(settings, host_id(), serve=False)
        # The own node is read from the session's mapping whatever ways to peers are enabled: it is there, and warm.
        self._own = ShmTransport(host_id())
        self._own_region: Region | None = None
        self._loads: queue.SimpleQueue[Pull | None] = queue.SimpleQueue()
        self._rates, self._meter = Rates(), Meter()
        self._measured: deque[Measured] = deque(maxlen=MEASURED_MAX)
        self._measuring = threading.Lock()
        self._saver = Saver(session)
        self._closing = False
        self._threads = [
            threading.Thread(target=self._run, args=(self._load_loop,), name="kvshare-load", daemon=True),
            threading.Thread(target=self._run, args=(self._saver.run,), name="kvshare-save", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    # --- loads --------------------------------------------------------------------------------------------------------

    def load(self, plan: LoadPlan, targets: Targets) -> Pull:
        """Read the plan's blocks into ``targets`` (block i of the plan to block i). Completes in bounded time."""
        pull = Pull(plan, targets, self._session.settings.transfer_seconds, self)
        if self._closing:
            pull.cancel()
        else:
            self._loads.put(pull)
        return pull

    def measured(self) -> list[Measured]:
        """What reads have moved since this was asked last."""
        if not self._measured:  # of nearly all steps of an engine
            return []
        with self._measuring:
            measured = list(self._measured)
            self._measured.clear()
        return measured

    def _load_loop(self) -> None:
        limited: set[Pull] = set()  # those that end when they do not pay any more
        while True:
            limited = {pull for pull in limited if pull.limited}
            try:
                pull = self._loads.get(timeout=self._next_deadline(limited))
            except queue.Empty:
                for late in list(limited):
                    late.advance()
                continue
            if pull is None:
                break
            pull.advance()
            if pull.limited:
                limited.add(pull)
        for pull in limited:
            pull.cancel()

    @staticmethod
    def _next_deadline(limited: set[Pull]) -> float | None:
        if not limited:
            return None
        return max(0.0, min(pull.deadline for pull in limited) - time.monotonic())

    # --- what loads need ----------------------------------------------------------------------------------------------

    def read(self, description: RegionDescription, request: ReadRequest) -> Transfer:
        region = self._session.region
        if region is None or not self.is_own(description):
            return self.transports.read(description, request)
        if region is not self._own_region:
            self._own.register(region)
            self._own_region = region
        return self._own.read(description, request)

    def is_own(self, description: RegionDescription) -> bool:
        own = self._session.description
        return own is not None and (description.node, description.table_path) == (own.node, own.table_path)

    def rate(self, source: Source) -> float:
        with self._measuring:
            return self._rates.rate(source, time.monotonic())

    def began(self, source: Source) -> None:
        with self._measuring:
            self._meter.began(source, time.monotonic())

    def ended(self, source: Source, moved: int) -> None:
        with self._measuring:
            measured = self._meter.ended(source, moved, time.monotonic())
            if moved:
                self._learn(measured)

    def gave_up(self, measured: Measured) -> None:
        with self._measuring:
            self._learn(measured)

    def corrupt(self, read: SourceRead, blocks: I64) -> None:
        log.warning("kvshare: %d blocks of node %s failed their checksum; recomputed", len(blocks), read.description.node)
        node = self._session.node
        if node is not None and read.description.node == node.node:
            self._session.quarantine(read.slots[blocks], read.generations[blocks])

    def missed(self, keys: list[bytes]) -> None:
        self._session.send(Missed(keys))

    def resume(self, pull: Pull) -> None:
        self._loads.put(pull)

    def _learn(self, measured: Measured) -> None:
        self._measured.append(measured)
        self._rates.observe(measured.source, measured.bytes, measured.seconds, time.monotonic(), measured.slow)

    # --- saves --------------------------------------------------------------------------------------------------------

    def save(self, block_keys: list[bytes], sources: Targets) -> SaveJob:
        """As `kvshare.saving.Saver.save`."""
        return self._saver.save(block_keys, sources)

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
        if self._closing:
            return
        self._closing = True
        self._saver.close()
        self._loads.put(None)
        self.transports.close()
        self._own.close()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=5.0)
