"""A worker that joins a fleet in the middle of a trace: what it finds of its first requests, by what it was warmed with.

    requests ──> one of the peers at random: its arena (kvshare's eviction)    ──┐
             ──> what is hot (`kvshare.hotness`), newest, ...  ── ranking ──> plan (`kvshare.plan`) ──> joiner ──> hits
    its first requests: each that follows is the joiner's with a chance of one in so many workers; or a router gives them

The fleet goes on as if nobody had joined, so each moment is a question of its own. A block can only be planned where a peer's
arena holds it at that moment. The joiner has room for the plan and for what its first requests bring; it saves those, so a
block is worth one hit at most to a plan: the first time that it is asked for, all blocks before it being there. Hence the
optimum: so many hits as the budget has blocks, or all that can be had (`Outcome.most`).

With a router (`route`), which requests the joiner gets depends on what it holds: there the most is what it would have found of
the same requests if it had held all that its peers held.

A seeded replay: equal arguments, equal figures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from bench_placement import Cache, Chain, Prompt, Returns, enter, leading

from kvshare import keys
from kvshare.eviction import S3Fifo
from kvshare.hotness import NO_PARENT, HotKey, Hotness
from kvshare.places import Location
from kvshare.plan import plan_warm
from kvshare.runs import Keys, Seen

FAMILY = b"replayed-blocks."
PREFIX = keys.prefix(FAMILY)
HASH_BYTES = 8  # of a block's name in the trace
PEER = Location("peer", 0, 0, 2, 1)  # a plan counts blocks: each has one byte
NEVER = -1.0

Values = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]
Held = npt.NDArray[np.bool_]  # by worker and block


@dataclass(frozen=True)
class Fleet:
    """``workers`` with the joiner; ``arena``: blocks of a peer at most; ``first``: so many requests of the joiner count;
    ``draws`` of those at each moment. Where a router gives them, for the policies ``routed``: each worker computes ``pace``
    blocks a second."""

    workers: int
    arena: int
    first: int = 200
    draws: int = 5
    routed: tuple[str, ...] = ()
    pace: float = 9.0
    seed: int = 1


class History:
    """What can be known of blocks at some moment, one entry each in arrays; blocks are numbered as they first appear."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self.number: dict[bytes, int] = {}
        self.chains: list[Numbers] = []
        before: dict[int, int] = {}
        for _, chain in prompts:
            numbers = [self.number.setdefault(key, len(self.number)) for key in chain]
            before.update(zip(numbers[1:], numbers, strict=False))
            self.chains.append(np.array(numbers, np.int64))
        count = len(self.number)
        self.names = [PREFIX + key for key in self.number]
        self.parent = np.array([before.get(number, -1) for number in range(count)])
        self.depth = np.zeros(count, np.int64)
        for numbers in self.chains:
            self.depth[numbers] = np.arange(len(numbers))
        self.last = np.full(count, NEVER)  # second of the latest request
        self.owner = np.full(count, -1)  # the latest request

    def asked(self, request: int, second: float) -> None:
        self.last[self.chains[request]] = second
        self.owner[self.chains[request]] = request

    def ranking(self, values: Values) -> list[HotKey]:
        """Blocks that have been asked for, best first; a block is worth as much as the best one that needs it."""
        closed = values.tolist()
        for number in range(len(closed) - 1, 0, -1):
            parent = self.parent[number]
            if parent >= 0 and closed[parent] < closed[number]:
                closed[parent] = closed[number]
        known = np.flatnonzero(self.last > NEVER)
        order = known[np.lexsort((self.depth[known], -np.array(closed)[known]))]
        names, parents = self.names, self.parent[order].tolist()
        return [HotKey(names[i], names[p] if p >= 0 else NO_PARENT) for i, p in zip(order.tolist(), parents, strict=True)]


class Rankings:
    """The policies that are compared. Each ranks the blocks that are known at a moment; hotness by the half-lives given."""

    def __init__(self, prompts: Sequence[Prompt], history: History, half_lives: Sequence[float], keys_max: int) -> None:
        self._history = history
        self._returns = Returns(prompts)
        self._hot = {seconds: Hotness(seconds, keys_max) for seconds in half_lives}
        self.names = [f"hot_{seconds:g}" for seconds in half_lives] + ["newest", "informed", "fleet"]

    def asked(self, chain: Chain, second: float) -> None:
        for hotness in self._hot.values():
            hotness.touch(Seen(Keys(PREFIX, HASH_BYTES, b"".join(chain))), second)

    def all(self, second: float, coming: Sequence[Numbers]) -> Iterator[list[HotKey]]:
        """In order of ``names``. coming: what the whole fleet is asked for while the joiner gets its first requests."""
        history = self._history
        for hotness in self._hot.values():
            yield hotness.hottest(FAMILY, len(history.names))
        yield history.ranking(history.last)
        known = np.flatnonzero(history.owner >= 0)
        chances = np.zeros(len(history.names))
        chances[known] = self._returns.rank(history.owner[known], second)
        yield history.ranking(chances)
        uses = np.zeros(len(history.names))
        for numbers in coming:
            uses[numbers] += 1
        yield history.ranking(uses)


class Given(NamedTuple):
    """Of a joiner that a router gave its requests: blocks asked for, found, and what it would have found with all that its
    peers had."""

    asked: int
    found: int
    most: int


@dataclass(frozen=True)
class Outcome:
    """Of one moment, all draws together. Blocks that the joiner's first requests asked for; of those, found without a plan,
    with each policy's at each budget, and at most; blocks that peers held; seconds that the first requests took, on average.
    ``given``: at each budget, by policy, if a router had given the requests."""

    asked: int
    none: int
    hits: dict[str, list[int]]
    most: list[int]
    held: int
    seconds: float
    given: dict[str, list[Given]]


def replay(
    prompts: Sequence[Prompt],
    fleet: Fleet,
    budgets: Sequence[int],
    moments: Sequence[int],
    half_lives: Sequence[float],
    keys_max: int,
) -> Iterator[Outcome]:
    """One outcome for each of ``moments``, numbers of requests. budgets: blocks, ascending. keys_max: of hotness."""
    history = History(prompts)
    rankings = Rankings(prompts, history, half_lives, keys_max)
    chance = np.random.default_rng(fleet.seed)
    peers: list[Cache] = [S3Fifo() for _ in range(fleet.workers - 1)]
    for request, (second, chain) in enumerate(prompts):
        if request in moments:
            held = np.array([[key in peer for key in history.number] for peer in peers])
            yield _joined(history, rankings, fleet, request, held, budgets, prompts)
        peer = peers[int(chance.integers(len(peers)))]
        hits = leading(peer.__contains__, chain)
        peer.follow(chain)
        for key in chain[:hits]:
            peer.touch(key)
        enter(peer, chain[hits:], fleet.arena)
        rankings.asked(chain, second)
        history.asked(request, second)


def _joined(
    history: History,
    rankings: Rankings,
    fleet: Fleet,
    request: int,
    held: Held,
    budgets: Sequence[int],
    prompts: Sequence[Prompt],
) -> Outcome:
    """held: [peers, blocks]."""
    second = prompts[request].second
    drawn = [draw_requests(fleet, request, len(prompts), draw) for draw in range(fleet.draws)]
    joiners = [[history.chains[number] for number in mine] for mine in drawn]
    coming = history.chains[request : max(mine[-1] for mine in drawn) + 1]
    seconds = [prompt.second for prompt in prompts[request:]]
    available, cold = held.any(axis=0), np.zeros(len(history.names), bool)
    nones = [_found(chains, cold) for chains in joiners]
    mosts = [_found(chains, available) for chains in joiners]
    hits: dict[str, list[int]] = {name: [] for name in rankings.names}
    given = {"none": [route(history.chains[request:], seconds, held, cold, fleet)] * len(budgets)}
    for name, ranked in zip(rankings.names, rankings.all(second, coming), strict=True):
        planned = plan_blocks(ranked, history, available, budgets[-1])
        for budget in budgets:
            warm = cold.copy()
            warm[planned[:budget]] = True
            hits[name].append(sum(_found(chains, warm) for chains in joiners))
            if name in fleet.routed:
                given.setdefault(name, []).append(route(history.chains[request:], seconds, held, warm, fleet))
    best = [sum(min(most, none + budget) for none, most in zip(nones, mosts, strict=True)) for budget in budgets]
    for found in hits.values():
        assert all(np.array(found) <= best), "nothing does better than the oracle"
    return Outcome(
        asked=sum(len(numbers) for chains in joiners for numbers in chains),
        none=sum(nones),
        hits=hits,
        most=best,
        held=int(available.sum()),
        seconds=float(np.mean([prompts[mine[-1]].second - second for mine in drawn])),
        given=given,
    )


def draw_requests(fleet: Fleet, request: int, requests: int, draw: int) -> Numbers:
    """The numbers of the joiner's first requests, from ``request`` on."""
    chance = np.random.default_rng((fleet.seed, request, draw))
    mine = request + np.flatnonzero(chance.random(requests - request) < 1 / fleet.workers)[: fleet.first]
    assert len(mine) == fleet.first, "the trace ends too early for this moment"
    return mine


def plan_blocks(ranked: Sequence[HotKey], history: History, available: npt.NDArray[np.bool_], budget: int) -> Numbers:
    """Numbers of the blocks of kvshare's plan, in its order: a smaller budget is a beginning of it."""
    number = history.number

    def locate(key: bytes) -> list[Location]:
        return [PEER] if available[number[keys.hash_of(key)]] else []

    plan = plan_warm(ranked, lambda _: False, locate, lambda _: True, budget, float(budget))
    return np.array([number[keys.hash_of(item.key)] for item in plan.items], np.int64)


def _found(chains: Sequence[Numbers], held: npt.NDArray[np.bool_]) -> int:
    """Blocks that a worker which holds these finds of its requests, one after another; it keeps what it computes."""
    held, found = held.copy(), 0
    for numbers in chains:
        found += int(_leading(held[numbers]))
        held[numbers] = True
    return found


def route(chains: Sequence[Numbers], seconds: Sequence[float], held: Held, warm: npt.NDArray[np.bool_], fleet: Fleet) -> Given:
    """Requests go to the worker that is done with their prompt first: what it has queued, and what it does not hold of them,
    are computed at ``fleet.pace``. Until the joiner, which holds ``warm``, has got its first requests; nobody evicts
    meanwhile."""
    holds, queued = np.vstack([held, warm]), np.zeros(fleet.workers)
    reachable, now = held.any(axis=0), seconds[0]
    chance = np.random.default_rng(fleet.seed)
    asked = found = most = requests = 0
    for numbers, second in zip(chains, seconds, strict=True):
        queued, now = np.maximum(0.0, queued - fleet.pace * (second - now)), second
        hits = _leading(holds[:, numbers])
        until = queued + len(numbers) - hits
        worker = int(chance.choice(np.flatnonzero(until == until.min())))
        queued[worker] = until[worker]
        holds[worker, numbers] = True
        if worker == fleet.workers - 1:
            asked, found, most = asked + len(numbers), found + int(hits[worker]), most + int(_leading(reachable[numbers]))
            reachable[numbers] = True
            requests += 1
            if requests == fleet.first:
                break
    return Given(asked, found, most)


def _leading(here: npt.NDArray[np.bool_]) -> Numbers:
    """How many are true before the first that is not, along the last axis."""
    return np.asarray(np.logical_and.accumulate(here, axis=-1).sum(axis=-1), np.int64)
