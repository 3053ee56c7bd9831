"""The connector's half in the engine's worker process: carries out what the scheduler's half planned for a step.

    prepare ──> start_loads ──> (forward) ──> start_saves ──> finished ──> failed_blocks, stats

Saves hold no blocks: a block that this step may overwrite is taken out of the pending saves first (`prepare`): dropped if its
copy has not begun, else waited for, a memory copy. Loads hold theirs: vLLM frees a waiting request's blocks only after
`finished` named it, whatever became of it.

Threads: the engine's, except `_arrived`, called in a thread of the mover.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from kvshare.integrations.vllm.metadata import NOTHING, Load, Reads, StepMetadata, TransferStats
from kvshare.integrations.vllm.pages import Pages, Saving
from kvshare.loading import Measured
from kvshare.transport.base import BlockStatus, Completion

log = logging.getLogger("kvshare")

# In a step without a forward the engine only waits for loads: longer than one takes, shorter than a new request would mind.
ARRIVAL_SECONDS = 0.015
FLUSH_SECONDS = 1.0  # a copy that takes longer is worth a line in the log


class WorkerHalf:
    """See the module's docstring. ``measured``: what reads have moved since it was called last; ``close_all`` ends what
    ``pages`` stands on; ``leave_seconds``: what is queued may be saved so long when the engine ends."""

    def __init__(
        self,
        pages: Pages,
        measured: Callable[[], list[Measured]],
        close_all: Callable[[], None],
        leave_seconds: float,
    ) -> None:
        self._pages = pages
        self._leave_seconds = leave_seconds
        self._measured = measured
        self._close_all = close_all
        self._step: StepMetadata | None = None
        self._saves: list[tuple[Saving, frozenset[int]]] = []
        self._loads: dict[str, Load] = {}
        self._arrivals: list[tuple[Load, Completion]] = []
        self._arrival = threading.Condition()
        self._failed: set[int] = set()
        self._stats: TransferStats | None = None  # none while nothing has happened

    def prepare(self, step: StepMetadata) -> None:
        """Before anything of this step writes to the KV cache. May be called several times for a step."""
        if step is NOTHING:
            self._forget_done()
        elif step is not self._step:
            self._step = step
            self._forget_done()
            self._flush(step.overwritten)
            for load in step.loads:
                self._loads[load.request_id] = load
                self._pages.load(load.plan, load.block_ids).then(partial(self._arrived, load))

    def start_saves(self, step: StepMetadata) -> None:
        """After the forward of this step was given to the device."""
        for save in step.saves:
            self._saves.append((self._pages.save(save.keys, save.block_ids), frozenset(save.block_ids)))

    def finished(self, step: StepMetadata) -> set[str]:
        """Requests whose loads have ended, well or not, each named once."""
        if not self._loads:  # of nearly all steps: every microsecond here is one of a decoded token
            return set()
        with self._arrival:
            if not self._arrivals and not step.forward:
                self._arrival.wait(ARRIVAL_SECONDS)
            arrivals, self._arrivals = self._arrivals, []
        for load, completion in arrivals:
            del self._loads[load.request_id]
            self._account(load, completion, worthless=load.epoch != step.epoch)
        return {load.request_id for load, _ in arrivals}

    def failed_blocks(self) -> set[int]:
        """Blocks of the loads named by the last `finished` whose content is undefined: the engine recomputes them."""
        failed, self._failed = self._failed, set()
        return failed

    def stats(self) -> TransferStats | None:
        """What happened since the last call, or None."""
        stats, self._stats = self._stats, None
        return stats

    def reads(self) -> Reads | None:
        """What the scheduler's half should know of reads that have ended, or None."""
        measured = self._measured()
        return Reads(measured) if measured else None

    def close(self) -> None:
        """The engine ends: what it has computed and queued is still saved, if that takes no longer than ``leave_seconds``."""
        deadline = time.monotonic() + self._leave_seconds
        for saving, _ in self._saves:
            saving.wait(max(0.0, deadline - time.monotonic()))
        self._close_all()
        self._pages.close()

    def _arrived(self, load: Load, completion: Completion) -> None:
        with self._arrival:
            self._arrivals.append((load, completion))
            self._arrival.notify()

    def _account(self, load: Load, completion: Completion, worthless: bool) -> None:
        statuses = completion.statuses
        bad = np.arange(len(statuses)) if worthless else np.flatnonzero(statuses != BlockStatus.OK)
        self._failed.update(load.block_ids[i] for i in bad.tolist())
        self._count("blocks_loaded", len(statuses) - len(bad))
        self._count("bytes_loaded", 0 if worthless else completion.bytes)
        self._count("blocks_failed", len(bad))
        if len(bad):
            reason = "weights have changed" if worthless else completion.error
            log.info("kvshare: %d of %d blocks of a request are recomputed: %s", len(bad), len(statuses), reason)

    def _count(self, name: str, value: int) -> None:
        if value:
            self._stats = self._stats or TransferStats.of(None)
            self._stats.add(name, value)

    def _forget_done(self) -> None:
        if not self._saves:
            return
        pending = []
        for saving, blocks in self._saves:
            if saving.done:
                self._count("blocks_saved", saving.saved)
            else:
                pending.append((saving, blocks))
        self._saves = pending

    def _flush(self, overwritten: list[int]) -> None:
        if not self._saves or not overwritten:
            return
        hit = [saving for saving, blocks in self._saves if not blocks.isdisjoint(overwritten)]
        for saving in hit:
            saving.cancel()
        for saving in hit:
            # No way around: what has begun to be copied must not change under the copy.
            while not saving.wait(FLUSH_SECONDS):
                log.warning("kvshare: a step waits for blocks that are being saved")
