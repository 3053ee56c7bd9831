"""A fleet of engines in simulated time, for comparing who sends requests where (`bench_routing.py`).

    arrive ──policy──> queue ──its turn──> [pull from a peer] ──> prefill, one at a time ──> first token ──decode──> end

An engine computes prompts in the order of its queue, one at a time, at a fixed rate. When it is a request's turn, the leading
blocks that the engine's memory has count as hits; further ones that another engine has are pulled, if the fleet can and if that
is clearly faster than computing them (`kvshare.cost`); meanwhile the engine computes the next in the queue. What an engine
gives to others goes through one link, one read behind the other. Memory keeps the least recently used blocks, the end of a
prompt leaving before its beginning. Decoding takes a time for each token and no room in the queue.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from kvshare.cost import CLEARLY, LATENCY_SECONDS

BLOCK_TOKENS = 512


class Request(NamedTuple):
    """number: by which policies know it. chain: ids of its full blocks."""

    number: int
    second: float
    tokens: int
    output: int
    chain: tuple[int, ...]


@dataclass(frozen=True)
class Machine:
    """Of each engine. memory: blocks."""

    prefill_rate: float = 20_000.0
    block_bytes: int = 512 * 131_072  # of an 8B model: 128 KiB a token
    link_rate: float = 10e9
    memory: int = 2_000
    token_seconds: float = 0.02
    pulls: bool = True


class Policy(Protocol):
    """Who decides, and what it hears."""

    def route(self, request: Request, fleet: Fleet, now: float) -> int: ...

    def first_token(self, request: Request, now: float) -> None:
        """The first token of a request is out."""

    def finished(self, request: Request, now: float) -> None:
        """A request has ended."""


@dataclass
class Engine:
    """``waiting``: requests and how many of their blocks are here for them, since they were pulled (-1: not asked yet)."""

    waiting: deque[tuple[Request, int]] = field(default_factory=deque)
    memory: OrderedDict[int, None] = field(default_factory=OrderedDict)
    busy: bool = False
    running: int = 0
    link_until: float = 0.0

    def leading(self, chain: Sequence[int]) -> int:
        return next((i for i, block in enumerate(chain) if block not in self.memory), len(chain))

    def keep(self, chain: Sequence[int], limit: int) -> None:
        for block in reversed(chain):
            self.memory[block] = None
            self.memory.move_to_end(block)
        while len(self.memory) > limit:
            self.memory.popitem(last=False)


@dataclass
class Outcome:
    """first_seconds: of each request, in the order of their first tokens. blocks: of all prompts; hits and pulled: of these."""

    first_seconds: list[float] = field(default_factory=list)
    blocks: int = 0
    hits: int = 0
    pulled: int = 0


class Fleet:
    """``count`` engines, and requests as a policy sends them."""

    def __init__(self, count: int, machine: Machine, policy: Policy) -> None:
        self.machine = machine
        self.engines = [Engine() for _ in range(count)]
        self.outcome = Outcome()
        self._policy = policy
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._numbers = itertools.count()

    def run(self, requests: Iterable[Request]) -> Outcome:
        for request in requests:
            self._at(request.second, lambda now, request=request: self._arrive(request, now))
        while self._events:
            now, _, happen = heapq.heappop(self._events)
            happen(now)
        return self.outcome

    def _at(self, second: float, happen: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (second, next(self._numbers), happen))

    def _arrive(self, request: Request, now: float) -> None:
        engine = self.engines[self._policy.route(request, self, now)]
        engine.running += 1
        engine.waiting.append((request, -1))
        self._serve(engine, now)

    def _serve(self, engine: Engine, now: float) -> None:
        """Take up what is next, until it is something to compute."""
        while engine.waiting and not engine.busy:
            request, here = engine.waiting.popleft()
            held = engine.leading(request.chain[: self.usable(request)])
            if here < 0 and self._pull(engine, request, held, now):
                continue
            found = max(held, here)
            self.outcome.blocks += len(request.chain)
            self.outcome.hits += found
            engine.busy = True
            seconds = (request.tokens - found * BLOCK_TOKENS) / self.machine.prefill_rate
            self._at(now + seconds, lambda now, request=request: self._first(engine, request, now))

    @staticmethod
    def usable(request: Request) -> int:
        """The last token is always computed."""
        return min(len(request.chain), (request.tokens - 1) // BLOCK_TOKENS)

    def _pull(self, engine: Engine, request: Request, held: int, now: float) -> bool:
        """Begin to pull what another engine has, where that pays."""
        if not self.machine.pulls:
            return False
        chain = request.chain[: self.usable(request)]
        source = max(self.engines, key=lambda other: (other.leading(chain), -other.link_until))
        count = source.leading(chain) - held
        queued = max(0.0, source.link_until - now)
        seconds = LATENCY_SECONDS + queued + count * self.machine.block_bytes / self.machine.link_rate
        if source is engine or count <= 0 or seconds > CLEARLY * count * BLOCK_TOKENS / self.machine.prefill_rate:
            return False
        source.link_until = now + seconds
        self._at(now + seconds, lambda now: self._loaded(engine, request, held + count, now))
        return True

    def _loaded(self, engine: Engine, request: Request, here: int, now: float) -> None:
        self.outcome.pulled += here - engine.leading(request.chain[:here])
        engine.keep(request.chain[:here], self.machine.memory)
        engine.waiting.appendleft((request, here))
        self._serve(engine, now)

    def _first(self, engine: Engine, request: Request, now: float) -> None:
        engine.busy = False
        engine.keep(request.chain, self.machine.memory)
        self.outcome.first_seconds.append(now - request.second)
        self._policy.first_token(request, now)
        self._at(now + request.output * self.machine.token_seconds, lambda now: self._end(engine, request, now))
        self._serve(engine, now)

    def _end(self, engine: Engine, request: Request, now: float) -> None:
        engine.running -= 1
        self._policy.finished(request, now)
