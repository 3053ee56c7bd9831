"""Measuring a peer that nobody has read from lately: a few of its blocks into scratch memory, in the background.

An answer that names an unmeasured source starts a probe of it and may wait for it a moment (`Locate.patience_seconds`); the
next question finds the rate. One probe of a source at a time; one that failed is not repeated for `PAUSE_SECONDS`.

Threads: all on the node's loop; reads run in the transports' threads.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np

from kvshare import keys, native
from kvshare.cost import Rates
from kvshare.loading import Source
from kvshare.places import Location, RegionDescription
from kvshare.transport.base import BlockStatus, Completion, ReadRequest, Targets
from kvshare.transport.choose import Transports
from kvshare.warm import completed

log = logging.getLogger("kvshare")

PROBE_BYTES = 1 << 20  # enough to tell a rate, little enough that it does not matter; one block may be more
PROBE_SECONDS = 5.0  # a source that takes longer is slow, and known to be
PAUSE_SECONDS = 5.0
REPEATS = 2  # of a probe that was quick; the best counts
REPEAT_SECONDS_MAX = 0.25  # what took longer is slow enough to be believed
REPEAT_SECONDS = 5.0  # what only a probe has measured is measured again after this

Block = tuple[bytes, Location]  # a key, and where it is said to be


class Prober:
    """See the module's docstring. ``rates`` learns the outcome; ``seconds``: longest time of a probe without progress."""

    def __init__(self, transports: Transports, rates: Rates, seconds: float) -> None:
        self.rates = rates
        self._transports = transports
        self._seconds = seconds
        self._running: dict[Source, asyncio.Task[None]] = {}
        self._failed: dict[Source, float] = {}  # when
        self._probed: dict[Source, float] = {}  # when a probe said its rate

    def start(
        self, blocks: Iterable[Block], describe: Callable[[Location], RegionDescription | None]
    ) -> list[asyncio.Task[None]]:
        """Probe what is unmeasured among the regions of ``blocks``, or was last measured by a probe a while ago; the probes
        under way, new or not, of those of which nothing is known yet."""
        now = time.monotonic()
        chosen: dict[tuple[str, int], list[Block]] = {}
        for key, location in blocks:
            chosen.setdefault((location.node, location.region), []).append((key, location))
        running: dict[Source, asyncio.Task[None]] = {}
        for mine in chosen.values():
            description = describe(mine[0][1])
            if description is None:
                continue
            source = (description.node, description.kind)
            if source not in self._running and self._due(source, now):
                task = asyncio.get_running_loop().create_task(self._probe(source, description, _few(mine)))
                self._running[source] = task
                task.add_done_callback(lambda _, source=source: self._running.pop(source, None))  # type: ignore[misc]
            if source in self._running and not self.rates.rate(source, now):
                running[source] = self._running[source]
        return list(running.values())

    def close(self) -> None:
        for task in self._running.values():
            task.cancel()

    def _due(self, source: Source, now: float) -> bool:
        if self.rates.rate(source, now) > 0:
            # One look may have come at a bad moment, and where it speaks against pulling no read will correct it.
            probed = self._probed.get(source)
            return probed is not None and probed == self.rates.measured_at(source) and now - probed >= REPEAT_SECONDS
        failed = self._failed.get(source)
        return failed is None or now - failed >= PAUSE_SECONDS

    async def _probe(self, source: Source, description: RegionDescription, blocks: Sequence[Block]) -> None:
        length = blocks[0][1].length
        scratch = np.empty(len(blocks) * length, np.uint8)
        request = ReadRequest(
            np.array([location.slot for _, location in blocks], np.int64),
            np.array([location.generation for _, location in blocks], np.uint64),
            np.array(keys.seeds_of(key for key, _ in blocks), np.uint64),
            Targets.strided(native.address_of(scratch), length, np.arange(len(blocks)), length),
            self._seconds,
        )
        deadline = time.monotonic() + PROBE_SECONDS
        best = await self._read(description, request, scratch, deadline)
        for _ in range(REPEATS):
            # The first may have had to connect, any may have waited for a processor.
            if not best.bytes or best.seconds > REPEAT_SECONDS_MAX:
                break
            again = await self._read(description, request, scratch, deadline)
            best = min(best, again, key=lambda one: one.seconds / max(1, one.bytes))
        now = time.monotonic()
        slow = now >= deadline
        if best.bytes or slow:
            self.rates.observe(source, best.bytes, best.seconds or PROBE_SECONDS, now, slow=slow)
            self._probed = {peer: at for peer, at in self._probed.items() if self.rates.measured_at(peer) == at}
            self._probed[source] = now
            log.debug("kvshare: reads from %s at %.3g MB/s", source[0], self.rates.rate(source, now) / 1e6)
        elif not (best.statuses == BlockStatus.STALE).all():
            self._failed = {peer: at for peer, at in self._failed.items() if now - at < PAUSE_SECONDS}
            self._failed[source] = now
            log.debug("kvshare: a probe of %s failed: %s", source[0], best.error)

    async def _read(
        self, description: RegionDescription, request: ReadRequest, scratch: np.ndarray, deadline: float
    ) -> Completion:
        """One read into ``scratch``, given up at ``deadline``."""
        transfer = self._transports.read(description, request)
        transfer.then(partial(_release, scratch))
        timer = asyncio.get_running_loop().call_later(max(0.0, deadline - time.monotonic()), transfer.cancel)
        try:
            return await completed(transfer)
        except asyncio.CancelledError:
            transfer.cancel()
            raise
        finally:
            timer.cancel()


def _few(blocks: Sequence[Block]) -> list[Block]:
    """The first of ``blocks``, of one length, that together hold `PROBE_BYTES`, at least one."""
    length = blocks[0][1].length
    alike = [block for block in blocks if block[1].length == length]
    return alike[: max(1, PROBE_BYTES // max(1, length))]


def _release(scratch: np.ndarray, completion: Completion) -> None:
    """Nothing to do: whoever is to call this keeps ``scratch`` alive until nothing writes to it any more."""
