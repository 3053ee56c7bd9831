"""The directory's warm plans: who asks for one, alone or with others, and who gives it.

    AskPlan ─> a `Plan` (`kvshare.plan`)
            ─> with others of its family (`kvshare.gathering`): Host to a donor ─> Hosted ─> a Plan to each

The index is asked for all hot blocks at once; locations are made only of those that a plan looks at.

A part of `kvshare.directory`, as pure as that. Threads: none; one caller.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import compress

import numpy as np

from kvshare.cluster_messages import AskPlan, Hosted, Plan
from kvshare.config import Settings
from kvshare.directory_events import Command, Send
from kvshare.gathering import Gatherings, Waiting
from kvshare.hotness import Hotness
from kvshare.index import RANK_NEVER, Index
from kvshare.keys import PREFIX_BYTES
from kvshare.leaving import Leavings
from kvshare.members import Members, Peer
from kvshare.places import DEVICE, DISK, Location, NodeDescription
from kvshare.plan import WarmPlan, plan_group, plan_warm
from kvshare.runs import COLUMN_GENERATION, COLUMN_PLACE, COLUMN_SLOT, Keys, Place

PLAN_BLOCKS_MAX = 1 << 15  # looked at for one plan
PLAN_BLOCKS = (1 << 12, PLAN_BLOCKS_MAX)  # first so many, which is enough for most: nobody else is answered meanwhile
DONORS_MAX = 8  # to choose from for one block of a plan
RATES_SECONDS = 600.0  # what somebody measured of a donor is believed for so long


class Planner:
    """See the module's docstring. Index, hotness, members, who leaves, and counters are the directory's."""

    def __init__(
        self,
        settings: Settings,
        index: Index,
        hotness: Hotness,
        members: Members,
        leavings: Leavings,
        counters: Counter[str],
    ) -> None:
        self._index = index
        self._hotness = hotness
        self._members = members
        self._leavings = leavings
        self._counters = counters
        self._gatherings = Gatherings(settings.warm_group_ranks, settings.warm_gather_seconds)
        self._busy_until: dict[str, float] = {}  # donors: when the plans made so far should be done
        self._rates: dict[str, tuple[float, float]] = {}  # donors: bytes per second, and when somebody said so last

    def deadlines(self) -> Iterator[float]:
        """When `tick` has something to say."""
        return self._gatherings.deadlines()

    def waiting(self) -> set[int]:
        """Connections that wait for a plan."""
        return self._gatherings.connections()

    def tick(self, now: float) -> list[Command]:
        """Plans for those who have waited for others in vain."""
        return self._plan_singly(self._gatherings.overdue(now), now)

    def leave(self, peer: Peer) -> None:
        """A connection is gone, and its node."""
        self._gatherings.leave(peer.connection)
        if peer.description is not None:
            self._busy_until.pop(peer.description.node, None)
            self._rates.pop(peer.description.node, None)

    def ask(self, peer: Peer, ask: AskPlan, now: float) -> list[Command]:
        """A plan of its own, unless it takes part in groups and something is hot: then it waits for others."""
        if peer.description is not None and peer.description.node in self._leavings:
            return [Send(peer.connection, Plan(ask.ask, [], 0, None))]
        self._learn(ask.rates, now)
        waiting = [Waiting(peer.connection, ask)]
        if not (ask.group and self._gatherings.ranks and self._hotness.knows(ask.family)):
            return self._plan_singly(waiting, now)
        joiners = self._gatherings.come(waiting[0], now)
        if not joiners:
            return []
        nodes = [self._members.at(each.connection) for each in joiners]
        ranked = self._hotness.hottest(ask.family, PLAN_BLOCKS_MAX, ask.tenant)
        hot = _packed(key for key, _ in ranked)
        plan = plan_group(
            ranked,
            [self._held(node, hot) for node in nodes],
            self._hosts(hot, nodes),
            min(each.ask.bytes_max for each in joiners),
            min(each.ask.seconds_max for each in joiners),
            self._busy(now),
            self._measured(now),
        )
        if not plan.items:
            return self._plan_singly(joiners, now)
        self._give_work(plan, now)
        donor = self._members.nodes[plan.items[0].location.node].connection
        return [Send(donor, self._gatherings.host(donor, joiners, plan.items, plan.present, now))]

    def hosted(self, peer: Peer, hosted: Hosted, now: float) -> list[Command]:
        plans, left_over = self._gatherings.hosted(peer.connection, hosted)
        self._counters["groups"] += bool(plans)
        commands: list[Command] = [Send(connection, plan) for connection, plan in plans]
        return commands + self._plan_singly(left_over, now)

    def _plan(self, node: NodeDescription, ask: AskPlan, now: float) -> Plan:
        self._counters["plans"] += 1
        for blocks in PLAN_BLOCKS:
            ranked = self._hotness.hottest(ask.family, blocks, ask.tenant)
            hot = _packed(key for key, _ in ranked)
            plan = plan_warm(
                ranked,
                self._held(node, hot).__contains__,
                self._donors(hot, node),
                lambda _: True,  # others are no donors
                ask.bytes_max,
                ask.seconds_max,
                self._busy(now),
                self._measured(now),
            )
            if len(ranked) < blocks or _is_full(plan, ask.bytes_max):
                break
        self._give_work(plan, now)
        return Plan(ask.ask, plan.items, plan.present, None)

    def _busy(self, now: float) -> dict[str, float]:
        return {name: until - now for name, until in self._busy_until.items() if until > now}

    def _learn(self, rates: dict[str, float], now: float) -> None:
        """Who has just begun has measured nobody: others have."""
        self._rates |= {
            name: (rate, now) for name, rate in rates.items() if name in self._members.nodes and 0 < rate < math.inf
        }

    def _measured(self, now: float) -> dict[str, float]:
        return {name: rate for name, (rate, told) in self._rates.items() if now - told < RATES_SECONDS}

    def _give_work(self, plan: WarmPlan, now: float) -> None:
        for name, seconds in plan.seconds.items():
            self._busy_until[name] = max(now, self._busy_until.get(name, now)) + seconds

    def _plan_singly(self, waiting: Iterable[Waiting], now: float) -> list[Command]:
        return [Send(each.connection, self._plan(self._members.at(each.connection), each.ask, now)) for each in waiting]

    def _held(self, node: NodeDescription, hot: list[Keys]) -> set[bytes]:
        """Those that this node holds."""
        held = self._index.holds(node.node, hot).tolist()
        return set(compress((key for keys in hot for key in keys), held))

    def _hosts(self, hot: list[Keys], joiners: list[NodeDescription]) -> _Sources:
        """Where nodes have blocks that can give them to all of these as a group: over TCP, from their own memory."""
        names = {node.node for node in joiners}
        allowed = [keys for keys in hot if all(self._members.may_hold(node, keys.prefix) for node in joiners)]

        def rank(place: Place) -> int:
            return 0 if place.node not in names and self._can_host(place.node) and self._in_arena(place) else RANK_NEVER

        return _Sources(self._index, allowed, rank)

    def _can_host(self, name: str) -> bool:
        if name not in self._members.nodes:
            return False
        node = self._members.description(name)
        return self._members.nodes[name].capable and name not in self._leavings and bool(node.endpoint) and not node.is_engine

    def _donors(self, hot: list[Keys], node: NodeDescription) -> _Sources:
        """Arenas, where blocks stay longer and reading disturbs no engine; engines and disks where no arena has the block;
        those of nodes that leave where nobody else has it."""
        allowed = [keys for keys in hot if self._members.may_hold(node, keys.prefix)]

        def rank(place: Place) -> int:
            if place.node == node.node or place.node not in self._members.nodes:
                return RANK_NEVER
            if not self._members.description(place.node).may_be_read_from(node.host_id):
                return RANK_NEVER
            return (not self._in_arena(place)) + 2 * self._leavings.leaves_with(place.node)

        return _Sources(self._index, allowed, rank)

    def _in_arena(self, place: Place) -> bool:
        return self._members.description(place.node).kind_of(place.region) not in (DEVICE, DISK)


class _Sources:
    """Where keys are, by key: up to `DONORS_MAX` locations, all of one rank, the lowest; freshest first. rank: of a place, as
    for `Index.find`."""

    def __init__(self, index: Index, wanted: Sequence[Keys], rank: Callable[[Place], int]) -> None:
        ranks = [RANK_NEVER if place is None else rank(place) for place in index.places()]
        found = index.find(wanted, np.array(ranks, np.uint8), DONORS_MAX)
        counts, place = np.frombuffer(found.counts, np.uint8), np.frombuffer(found.place, COLUMN_PLACE)
        owners = np.repeat(np.arange(len(counts)), counts)
        of_rows = np.fromiter(map(rank, found.places), np.uint8, len(found.places))[place]
        firsts = np.cumsum(counts, dtype=np.int64) - counts
        best = of_rows == of_rows[firsts[owners]]  # the lowest rank comes first
        places = [found.places[number] for number in place[best].tolist()]
        self._columns = (  # of a `Location`
            [each.node for each in places],
            [each.region for each in places],
            np.frombuffer(found.slots, COLUMN_SLOT)[best].tolist(),
            np.frombuffer(found.generations, COLUMN_GENERATION)[best].tolist(),
            [each.length for each in places],
            np.frombuffer(found.expires, COLUMN_SLOT)[best].tolist() if found.expires else [0] * len(places),
        )
        ends = np.cumsum(np.bincount(owners[best], minlength=len(counts)))
        rows = zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True) if len(counts) else ()
        self._rows = dict(zip((key for keys in wanted for key in keys), rows, strict=True))

    def __call__(self, key: bytes) -> list[Location]:
        start, end = self._rows.get(key, (0, 0))
        return list(map(Location, *[column[start:end] for column in self._columns]))


def _is_full(plan: WarmPlan, bytes_max: int) -> bool:
    """Was there no room for another block?"""
    lengths = [item.location.length for item in plan.items]
    return sum(lengths) + max(lengths, default=0) > bytes_max


def _packed(keys: Iterable[bytes]) -> list[Keys]:
    """These keys, packed; those of a prefix come together, whatever their order."""
    hashes: dict[tuple[bytes, int], list[bytes]] = {}
    for key in keys:
        hashes.setdefault((key[:PREFIX_BYTES], len(key) - PREFIX_BYTES), []).append(key[PREFIX_BYTES:])
    return [Keys(prefix, size, b"".join(group)) for (prefix, size), group in hashes.items()]
