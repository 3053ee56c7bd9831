"""Pull or compute, and from whom: decided by measured rates. Pure: time is an argument.

    reads that ended ──> Rates (bytes/s of each source) ─┐
    steps that are back ──> Prefill (tokens/s) ──────────┴─> Cost.worth: how many leading blocks to pull

Pulling n blocks takes, of each source and all sources at once, a latency plus what is under way and asked for over the
source's rate; computing them takes their tokens over the prefill rate. Pulling must be clearly faster, since the estimate may
be wrong. When it is wrong nevertheless, the load itself ends early: it may spend what arrived blocks have saved so far, plus
`Cost.grace` (`kvshare.pull`).

Threads: none of its own; each owner calls from one thread, or holds a lock.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvshare.loading import LoadPlan, Measured, Offer, Source
from kvshare.places import DISK

F64 = npt.NDArray[np.float64]

LATENCY_SECONDS = 0.002  # of a read, beside its bytes: threads that wake, round trips
TELLING_SECONDS = 0.01  # a shorter read is mostly latency: it can show a source to be faster, not slower
FRESH_SECONDS = 60.0  # a measurement is believed for so long
FAILED_SECONDS = 15.0  # one that only says "too slow" for less: it is rough
BUSY_SECONDS = 1.0  # of a source that is never idle: measured anew after so long
SOURCES_MAX = 4096
NEWEST_SHARE = 0.75  # of the latest read in an estimate: a link changes at once, not by and by

CLEARLY = 0.8  # pull when that takes at most this share of computing
WAIT_SHARE = 0.02  # of computing: what may be lost by waiting for a first measurement, and again by a load that does not pay
RISK_SHARE = 0.04  # of computing: what a load may take until its first block, beyond the queue; else it is not begun
JITTER = 1.25  # times what a block should take
WAIT_SECONDS_MIN = 0.05  # a thread may have to wait for so long for a processor
OWN_RATE = 2e9  # bytes/s, of our own node's memory until it has been measured
OWN_RATE_MIN = 2e8  # memory is not slower: a read that was had to wait for a processor
ALIKE = 0.8  # a source whose rate is at least this share of the best one's is as good

STEP_TOKENS_MIN = 256  # a step that computed fewer is no prefill
STEP_SHARE = 0.7  # what weight the steps so far keep beside a new one


@dataclass
class Rate:
    """Bytes per second of one source, as of ``at``. ``rough``: all we know is that it was too slow."""

    value: float
    at: float
    rough: bool = False


class Rates:
    """Measured rates of sources, each believed as long as it is fresh."""

    def __init__(self) -> None:
        self._rates: dict[Source, Rate] = {}

    def observe(self, source: Source, moved: int, seconds: float, now: float, slow: bool = False) -> None:
        """A read of ``moved`` bytes took ``seconds``. ``slow``: it was given up for that, ``moved`` is what had arrived."""
        if not moved and not slow:
            return
        value = max(1.0, moved / max(seconds - LATENCY_SECONDS, seconds / 4, 1e-6))
        before = self._rates.pop(source, None)  # the latest last
        if before is not None and now - before.at < FRESH_SECONDS and not before.rough and not slow:
            if seconds < TELLING_SECONDS:
                value = max(value, before.value)
            # Seconds per byte are what adds up.
            value = 1.0 / (NEWEST_SHARE / value + (1.0 - NEWEST_SHARE) / before.value)
        self._rates[source] = Rate(value, now, slow)
        if len(self._rates) > SOURCES_MAX:
            del self._rates[next(iter(self._rates))]

    def rate(self, source: Source, now: float) -> float:
        """Bytes per second, at least 1; 0 where unknown, or measured too long ago."""
        rate = self._rates.get(source)
        if rate is None or now - rate.at >= (FAILED_SECONDS if rate.rough else FRESH_SECONDS):
            return 0.0
        return rate.value

    def of_nodes(self, now: float) -> dict[str, float]:
        """Bytes per second from each node's memory, where that was measured lately."""
        known: dict[str, float] = {}
        for (node, kind), rate in self._rates.items():
            if kind != DISK and not rate.rough and now - rate.at < FRESH_SECONDS:
                known[node] = max(known.get(node, 0.0), rate.value)
        return known

    def measured_at(self, source: Source) -> float:
        """When its rate was last observed; 0 where it never was."""
        rate = self._rates.get(source)
        return 0.0 if rate is None else rate.at

    def forget(self, node: str) -> None:
        for source in [source for source in self._rates if source[0] == node]:
            del self._rates[source]


@dataclass
class Busy:
    """A time during which a source was read from without a pause. ``reads``: under way; ``moved``: by those that have ended."""

    since: float
    reads: int = 0
    moved: int = 0


class Meter:
    """What a source gives to all reads together: each of several at once is slower than the source."""

    def __init__(self) -> None:
        self._busy: dict[Source, Busy] = {}

    def began(self, source: Source, now: float) -> None:
        self._busy.setdefault(source, Busy(now)).reads += 1

    def ended(self, source: Source, moved: int, now: float) -> Measured:
        busy = self._busy[source]
        busy.reads -= 1
        busy.moved += moved
        measured = Measured(source, busy.moved, now - busy.since)
        if not busy.reads:
            del self._busy[source]
        elif measured.seconds > BUSY_SECONDS:
            self._busy[source] = Busy(now, busy.reads)
        return measured


class Candidate(NamedTuple):
    """A region that holds a block. ``near``: on the asking node's host."""

    source: Source
    region: int
    near: bool


def choose(chain: Sequence[Sequence[Candidate]], rates: Rates, now: float) -> list[int]:
    """Which of each block's candidates to read: index, -1 where there is none.

    The fastest, where one that has not been measured counts as the average of those that have been. Among equally good ones
    that of the block before, since few large reads are faster than many; then one on the same host; then the first.
    """
    sources = {candidate.source for candidates in chain for candidate in candidates}
    known = {source: rate for source in sources if (rate := rates.rate(source, now)) > 0}
    average = sum(known.values()) / len(known) if known else 1.0
    chosen: list[int] = []
    current: Candidate | None = None
    for candidates in chain:
        if not candidates:
            chosen.append(-1)
            continue
        values = [known.get(candidate.source, average) for candidate in candidates]
        good = [i for i, value in enumerate(values) if value >= ALIKE * max(values)]
        # Memory before disk: reading it disturbs nobody.
        best = min(good, key=lambda i: (candidates[i].source[1] == DISK, candidates[i] != current, not candidates[i].near, i))
        current = candidates[best]
        chosen.append(best)
    return chosen


class Prefill:
    """Tokens per second that an engine computes, from its steps."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0

    def stepped(self, tokens: int, seconds: float) -> None:
        """A step computed ``tokens`` in ``seconds``."""
        if tokens >= STEP_TOKENS_MIN and seconds > 0:
            self._tokens = STEP_SHARE * self._tokens + tokens
            self._seconds = STEP_SHARE * self._seconds + seconds

    def seconds(self, tokens: int) -> float:
        """How long ``tokens`` would take; 0 while nothing has been measured."""
        return tokens * self._seconds / self._tokens if self._tokens else 0.0


class Cost:
    """What an engine's scheduler decides by. block_bytes, block_tokens: of each of its blocks."""

    def __init__(self, block_bytes: int, block_tokens: int) -> None:
        self._block_bytes = block_bytes
        self._block_tokens = block_tokens
        self._prefill = Prefill()
        self._steps: deque[tuple[int, float]] = deque()  # tokens, and when they were sent
        self._returned = 0.0  # when the last one was back
        self._rates = Rates()

    def sent(self, tokens: int, now: float) -> None:
        """A step that computes ``tokens`` goes to the workers. Several may be under way; they come back in this order."""
        self._steps.append((tokens, now))

    def returned(self, now: float) -> None:
        """The step that was sent first of those under way is back."""
        if self._steps:
            tokens, sent = self._steps.popleft()
            self._prefill.stepped(tokens, now - max(sent, self._returned))
            self._returned = now

    def measured(self, reads: Iterable[Measured], now: float) -> None:
        """Reads of this engine have ended."""
        for read in reads:
            self._rates.observe(read.source, read.bytes, read.seconds, now, read.slow)

    def patience(self, blocks: int) -> float:
        """Seconds that may pass until the sources of so many blocks have been measured."""
        return max(WAIT_SECONDS_MIN, WAIT_SHARE * self._seconds(blocks))

    def fetch_seconds(self, blocks: int) -> float:
        """Seconds that so many blocks may take to be fetched from a slow tier; 0 while nothing has been measured."""
        return CLEARLY * self._seconds(blocks)

    def worth(self, offer: Offer, loads: Iterable[LoadPlan], now: float) -> int:
        """How many of the leading blocks of ``offer`` to pull while ``loads`` are under way; the others are computed."""
        rates = self._rates_of(offer, now)
        risk = max(WAIT_SECONDS_MIN, RISK_SHARE * self._seconds(len(offer.source)))
        known = self._prefill.seconds(1) > 0
        unusable = (rates <= 0) | (known & (self._block_seconds(rates) > risk))
        ends = np.flatnonzero(unusable[offer.source])
        count = int(ends[0]) if len(ends) else len(offer.source)
        if not count or not known:
            return count
        queued = self._queued(offer, loads)
        pulling = np.zeros(count)
        for i in np.unique(offer.source[:count]).tolist():
            blocks = np.cumsum(offer.source[:count] == i)
            seconds = LATENCY_SECONDS + (queued[i] + blocks * self._block_bytes) / rates[i]
            pulling = np.maximum(pulling, np.where(blocks > 0, seconds, 0.0))
        computing = self._seconds(1) * np.arange(1, count + 1)
        saved = CLEARLY * computing - pulling
        best = int(np.argmax(saved))
        return best + 1 if saved[best] > 0 else 0

    def limited(self, plan: LoadPlan, offer: Offer, loads: Iterable[LoadPlan], now: float) -> LoadPlan:
        """``plan``, the leading blocks of ``offer``, with what its load may cost."""
        seconds = self._seconds(len(plan))
        if not seconds:
            return plan
        rates, queued = self._rates_of(offer, now), self._queued(offer, loads)
        first = [
            max(self.patience(len(plan)), float(self._block_seconds(rates)[i])) + queued[i] / rates[i]
            for i in np.unique(offer.source[: len(plan)]).tolist()
            if rates[i] > 0
        ]
        return replace(plan, seconds=seconds, grace_seconds=max(first, default=0.0))

    def _block_seconds(self, rates: F64) -> F64:
        """Until the first block of a source has surely arrived, if its rate is still what it was."""
        return np.asarray(JITTER * (LATENCY_SECONDS + self._block_bytes / np.maximum(rates, 1.0)))

    def _seconds(self, blocks: int) -> float:
        return self._prefill.seconds(blocks * self._block_tokens)

    def _rates_of(self, offer: Offer, now: float) -> F64:
        """Of each source of an offer: our own measurement, else our node's; 0 where unknown."""
        rates = [self._rates.rate(source, now) or told for source, told in zip(offer.sources, offer.rates, strict=True)]
        if offer.own:
            rates[0] = max(rates[0] or OWN_RATE, OWN_RATE_MIN)
        return np.array(rates)

    def _queued(self, offer: Offer, loads: Iterable[LoadPlan]) -> list[int]:
        """Bytes under way from each source of an offer."""
        queued: dict[Source, int] = defaultdict(int)
        for load in loads:
            for read in load.reads:
                queued[read.source] += len(read.slots) * self._block_bytes
        return [queued[source] for source in offer.sources]
