"""Which replica answers soonest: a request goes where the least time to the first token is predicted.

    overlap of the prompt (`kvshare.overlap`) ──┐
    first tokens, ends, rates, loads as told ───┴─> Router.rank ──> the caller sends to one ──> Router.routed

The seconds of a replica (of each of its data-parallel ranks) are those until its queue is worked off, those until the blocks
have come that it would pull when it is this request's turn, and those of computing the rest. Its engine's own blocks cost
nothing. Those in its host's memory or on its disk, and those of other hosts, cost their bytes over the source's rate, behind
what else is read there; they are pulled where that is clearly faster than computing, as the engine decides it by
`kvshare.cost`. So a hot prefix does not pile up requests on who holds it: the queue there grows with every request that is
sent, until elsewhere is sooner.

What this router sends counts at once. It is worked off as time passes, at the replica's rate, and corrected by what is told:
first tokens, ends, and how many requests run there in all. Who brings no first token when one was due is taken to need as long
again as it is late. Where nobody knows the overlap (None), it is power of two choices by load.

Pure: time is an argument, in seconds. Threads: none; one caller.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvshare.cost import CLEARLY, LATENCY_SECONDS, OWN_RATE, SOURCES_MAX, Prefill, Rates
from kvshare.overlap import NOTHING, Held
from kvshare.places import DISK, HOST

REQUESTS_MAX = 65_536  # that are remembered; the oldest are then taken to have ended
REQUEST_SECONDS_MAX = 600.0  # and so are those that nothing was heard of for so long
CHOICES_MAX = 8  # of a ranking: whoever is refused by so many waits anyway
ALIKE_SECONDS = 0.001  # predictions that differ by less are equal
RATES_SECONDS = 0.5  # measured rates are looked up again after so long
NEAR = "near:"  # before a node's name: read by its own host
UNHEARD = math.inf

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Costs:
    """What a block is, and rates as long as none has been measured: tokens and bytes a second."""

    block_tokens: int
    block_bytes: int
    prefill_rate: float = 10_000.0
    host_rate: float = OWN_RATE
    peer_rate: float = 1e9
    disk_rate: float = 1e9


@dataclass(frozen=True)
class Replica:
    """Who can be sent to. node: kvshare's name of the node on its host, "" where there is none. engines: of each data-parallel
    rank the name ("node/engine") by which peers know its cache, "" where they do not."""

    name: str
    node: str
    engines: tuple[str, ...] = ("",)


class Choice(NamedTuple):
    """A rank of a replica, and what is predicted of it. seconds: until the first token, of them waiting and computing. blocks:
    full ones of the prompt; held: leading ones that the engine has; near, far: further ones that it would pull from its host,
    and from ``source``."""

    replica: str
    rank: int
    seconds: float
    waiting: float
    computing: float
    blocks: int
    held: int
    near: int
    far: int
    source: str


class Flight(NamedTuple):
    """A request without a first token. tokens: to be computed."""

    choice: Choice
    tokens: int
    sent: float
    due: float


class Sources(NamedTuple):
    """What can be read, in columns; the first is nothing. blocks: int64; queued: seconds until its first byte; second: for each
    block."""

    names: Sequence[str]
    blocks: I64
    queued: F64
    second: F64


@dataclass
class Engine:
    """One rank of a replica, as this router knows it."""

    replica: str
    rank: int
    node: str
    name: str
    flights: OrderedDict[str, Flight] = field(default_factory=OrderedDict)
    running: int = 0  # requests of ours, with a first token or without
    others: int = 0  # requests of other routers, as told
    until: float = 0.0  # when its queue is worked off
    queued: float = 0.0  # seconds of computing of all flights
    returned: float = 0.0  # when it last brought a first token; 0: nobody tells
    prefill: Prefill = field(default_factory=Prefill)

    @property
    def due(self) -> float:
        """When its oldest flight was due; `UNHEARD` where there is none, or nobody would tell."""
        return next(iter(self.flights.values())).due if self.returned and self.flights else UNHEARD

    def land(self, request: str) -> Flight | None:
        """Its first token is out, or no more expected."""
        flight = self.flights.pop(request, None)
        if flight is not None:
            self.queued = self.queued - flight.choice.computing if self.flights else 0.0
        return flight


class Router:
    """See the module's docstring. ``costs`` may be replaced at any time. ``seed``: of its random choices."""

    def __init__(self, costs: Costs, seed: int | None = None) -> None:
        self.costs = costs
        self._engines: dict[tuple[str, int], Engine] = {}
        self._owners: OrderedDict[str, tuple[Engine, float]] = OrderedDict()  # of requests that run, and since when, in order
        self._rates = Rates()
        self._known: dict[str, tuple[float, float]] = {}  # by source: rates of memory and disk, as of a moment ago
        self._known_until = 0.0
        self._reading: dict[str, float] = {}  # by source: when what is read from it has come
        self._turn = 0
        self._random = random.Random(seed)

    def update(self, replicas: Iterable[Replica]) -> None:
        """These there are now. What is known of those that stay is kept."""
        before, self._engines = self._engines, {}
        for replica in replicas:
            for rank, name in enumerate(replica.engines):
                known = before.get((replica.name, rank))
                if known is None or (known.node, known.name) != (replica.node, name):
                    known = Engine(replica.name, rank, replica.node, name)
                self._engines[replica.name, rank] = known
        for request, (engine, _) in list(self._owners.items()):
            if self._engines.get((engine.replica, engine.rank)) is not engine:
                del self._owners[request]

    # --- decisions ----------------------------------------------------------------------------------------------------

    def rank(
        self, tokens: int, overlap: Mapping[str, Held] | None, now: float, among: Collection[str] | None = None
    ) -> list[Choice]:
        """Where to send a prompt of so many tokens: at most `CHOICES_MAX`, the best first.

        overlap: by node; None: nobody knows, and the answer is two at random, the less loaded first. among: names of replicas
        that may be chosen; default: all.
        """
        engines = [engine for engine in self._engines.values() if among is None or engine.replica in among]
        if overlap is None:
            engines = self._random.sample(engines, min(2, len(engines)))
        if not engines:
            return []
        self._turn += 1
        if now >= self._known_until:
            self._known, self._known_until = {}, now + RATES_SECONDS
        seconds, choose = self._predict(engines, tokens, overlap or {}, now)
        loads = np.array([engine.running + engine.others for engine in engines])
        turns = (np.arange(len(engines)) - self._turn) % len(engines)  # what is new everywhere is spread
        order = np.lexsort((turns, loads, np.round(seconds / ALIKE_SECONDS)))[:CHOICES_MAX]
        return [choose(place) for place in order.tolist()]

    def _predict(
        self, engines: Sequence[Engine], tokens: int, overlap: Mapping[str, Held], now: float
    ) -> tuple[F64, Callable[[int], Choice]]:
        """Seconds until the first token on each of ``engines``, and what makes each one's `Choice`."""
        costs = self.costs
        second = np.array([engine.prefill.seconds(1) for engine in engines])
        second[second == 0] = 1.0 / costs.prefill_rate
        waiting = self._waiting(engines, now)
        blocks = max(0, tokens - 1) // costs.block_tokens  # the last token is always computed
        held = np.minimum([overlap.get(engine.name, NOTHING).blocks for engine in engines], blocks)
        sources, near, far = self._sources(engines, overlap, now)
        to_near = np.clip(sources.blocks[near], held, blocks)
        to_far = np.clip(sources.blocks[far], to_near, blocks)
        best, pulled, pulling = waiting + (tokens - held * costs.block_tokens) * second, held, np.zeros(len(engines))
        for start, end, source in ((held, to_near, near), (to_near, to_far, far)):
            coming = sources.queued[source] + (end - start) * sources.second[source]
            pulling = np.maximum(pulling, np.where(end > start, coming, 0.0))
            # The engine pulls only what comes clearly sooner than it is computed.
            worth = (end > start) & (pulling <= CLEARLY * (end - held) * costs.block_tokens * second)
            seconds = waiting + pulling + (tokens - end * costs.block_tokens) * second
            better = worth & (seconds < best)
            best, pulled = np.where(better, seconds, best), np.where(better, end, pulled)

        def choose(place: int) -> Choice:
            engine, start, end = engines[place], int(held[place]), int(pulled[place])
            middle = min(int(to_near[place]), end)
            computing = float((tokens - end * costs.block_tokens) * second[place])
            source = sources.names[far[place]] if end > middle else ""
            times = float(best[place]), float(waiting[place]), computing
            return Choice(engine.replica, engine.rank, *times, blocks, start, middle - start, end - middle, source)

        return best, choose

    @staticmethod
    def _waiting(engines: Sequence[Engine], now: float) -> F64:
        """Seconds until each could begin something new."""
        until, due = np.array([(engine.until, engine.due) for engine in engines]).T
        own: F64 = np.maximum(until - now, 0.0) + np.maximum(now - due, 0.0)
        others = np.array([engine.others for engine in engines])
        if not others.any():
            return own
        # A request of another router stands for as much as one of ours does on average.
        running = sum(engine.running for engine in engines)
        own += others * (own.sum() / running if running else 0.0)
        return own

    def _sources(self, engines: Sequence[Engine], overlap: Mapping[str, Held], now: float) -> tuple[Sources, I64, I64]:
        """What can be read, and for each engine which of it is near, and which far: int64 [engines]."""
        hosts: dict[str, tuple[str, Held]] = {}  # who on each holds most: the node itself, or an engine's cache
        for name, held in overlap.items():
            host = name.partition("/")[0]
            if host not in hosts or held.blocks > hosts[host][1].blocks:
                hosts[host] = name, held
        leaders = heapq.nlargest(2, hosts, key=lambda host: hosts[host][1].blocks)
        places = {host: place for place, host in enumerate(hosts, 1)}
        names = ["", *[NEAR + host for host in hosts], *[hosts[host][0] for host in leaders]]
        helds = [*[each for _, each in hosts.values()], *[hosts[host][1] for host in leaders]]
        blocks = np.array([0, *[each.blocks for each in helds]])
        on_disk = np.array([0, *[each.on_disk for each in helds]]) / np.maximum(blocks, 1)
        memory, disk = np.array([self._known.get(name) or self._rates_of(name, now) for name in names]).T
        queued = np.full(len(names), LATENCY_SECONDS)
        for place in range(len(names) - len(leaders), len(names)):
            queued[place] += max(0.0, self._reading.get(names[place], 0.0) - now)
        sources = Sources(names, blocks, queued, self.costs.block_bytes * ((1 - on_disk) / memory + on_disk / disk))
        near = np.array([places.get(engine.node, 0) for engine in engines])
        first, second = (len(names) - len(leaders) + i if i < len(leaders) else 0 for i in range(2))
        # Who stands beside the first reads what is farther away from the second.
        return sources, near, np.where(near == places[leaders[0]], second, first) if leaders else near

    def _rates_of(self, name: str, now: float) -> tuple[float, float]:
        memory = self._rates.rate((name, HOST), now)
        memory = memory or (self.costs.host_rate if name.startswith(NEAR) else self.costs.peer_rate)
        self._known[name] = memory, min(memory, self._rates.rate((name, DISK), now) or self.costs.disk_rate)
        return self._known[name]

    # --- what happens -------------------------------------------------------------------------------------------------

    def routed(self, request: str, choice: Choice, tokens: int, now: float) -> None:
        """``request`` goes to ``choice``; to another than before, if it was routed before. Who is gone is ignored."""
        self._drop(request, now)
        engine = self._engines.get((choice.replica, choice.rank))
        if engine is None:
            return
        while self._owners:
            oldest, (_, since) = next(iter(self._owners.items()))
            if len(self._owners) < REQUESTS_MAX and now - since < REQUEST_SECONDS_MAX:
                break
            self._drop(oldest, now)
        self._owners[request] = engine, now
        computed = tokens - (choice.held + choice.near + choice.far) * self.costs.block_tokens
        engine.flights[request] = Flight(choice, computed, now, now + choice.seconds)
        engine.running += 1
        engine.queued += choice.computing
        engine.until = max(engine.until, now) + choice.computing
        if choice.far:
            rate, _ = self._rates_of(choice.source, now)
            reading = max(self._reading.pop(choice.source, 0.0), now) + choice.far * self.costs.block_bytes / rate
            self._reading[choice.source] = reading  # the latest last
            if len(self._reading) > SOURCES_MAX:
                del self._reading[next(iter(self._reading))]

    def first_token(self, request: str, now: float) -> None:
        """The first token of ``request`` is out."""
        engine, _ = self._owners.get(request, (None, 0.0))
        flight = None if engine is None else engine.land(request)
        if engine is None or flight is None:
            return
        if not flight.choice.near and not flight.choice.far:
            engine.prefill.stepped(flight.tokens, now - max(flight.sent, engine.returned))
        engine.returned = now
        engine.until = now + engine.queued

    def finished(self, request: str, now: float) -> None:
        """``request`` has ended, whatever came of it."""
        self._drop(request, now)

    def computed(self, replica: str, tokens: int, seconds: float, rank: int = 0) -> None:
        """A replica says that it computed so many tokens of prompts in so many seconds."""
        engine = self._engines.get((replica, rank))
        if engine is not None and math.isfinite(seconds):
            engine.prefill.stepped(tokens, seconds)

    def told(self, replica: str, running: int, rank: int = 0) -> None:
        """So many requests run there, ours and those of other routers."""
        engine = self._engines.get((replica, rank))
        if engine is not None:
            engine.others = max(0, running - engine.running)

    def measured(self, node: str, kind: str, moved: int, seconds: float, now: float, near: bool = False) -> None:
        """Somebody read so many bytes from a region of this kind of a node; ``near``: its own host did."""
        source = NEAR + node if near else node
        self._rates.observe((source, kind), moved, seconds, now)
        self._known.pop(source, None)

    def check(self) -> list[str]:
        """Problems found, one sentence each; empty when all is well."""
        problems = []
        for key, engine in self._engines.items():
            owned = sum(owner is engine for owner, _ in self._owners.values())
            if owned != engine.running:
                problems.append(f"{owned} requests run on {key}, {engine.running} are counted")
            if not engine.flights.keys() <= self._owners.keys():
                problems.append(f"{key} waits for a request that nobody knows")
            if not math.isclose(
                engine.queued, sum(flight.choice.computing for flight in engine.flights.values()), abs_tol=1e-6
            ):
                problems.append(f"{key} has {engine.queued} seconds queued")
        return problems

    def _drop(self, request: str, now: float) -> None:
        engine, _ = self._owners.pop(request, (None, 0.0))
        if engine is None:
            return
        engine.running -= 1
        if engine.land(request) is not None:
            engine.until = min(engine.until, now + engine.queued)
