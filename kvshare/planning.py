"""The directory's warm plans: who asks for one, alone or with others, and who gives it.

    AskPlan ─> a `Plan` (`kvshare.plan`)
            ─> with others of its family (`kvshare.gathering`): Host to a donor ─> Hosted ─> a Plan to each

A part of `kvshare.directory`, as pure as that. Threads: none; one caller.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from kvshare.cluster_messages import AskPlan, Hosted, Plan
from kvshare.config import Settings
from kvshare.directory_events import Command, Send
from kvshare.gathering import Gatherings, Waiting
from kvshare.hotness import Hotness
from kvshare.index import Index
from kvshare.leaving import Leavings
from kvshare.members import Members, Peer
from kvshare.places import DEVICE, DISK, Location, NodeDescription
from kvshare.plan import WarmPlan, plan_group, plan_warm

PLAN_BLOCKS_MAX = 1 << 15  # looked at for one plan
DONORS_MAX = 8  # to choose from for one block of a plan


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

    def ask(self, peer: Peer, ask: AskPlan, now: float) -> list[Command]:
        """A plan of its own, unless it takes part in groups and something is hot: then it waits for others."""
        if peer.description is not None and peer.description.node in self._leavings:
            return [Send(peer.connection, Plan(ask.ask, [], 0, None))]
        waiting = [Waiting(peer.connection, ask)]
        if not (ask.group and self._gatherings.ranks and self._hotness.hottest(ask.family, 1)):
            return self._plan_singly(waiting, now)
        joiners = self._gatherings.come(waiting[0], now)
        if not joiners:
            return []
        nodes = [self._members.at(each.connection) for each in joiners]
        plan = plan_group(
            self._hotness.hottest(ask.family, PLAN_BLOCKS_MAX),
            [self._index.held_by(node.node) for node in nodes],
            lambda key: self._hosts(key, nodes),
            min(each.ask.bytes_max for each in joiners),
            min(each.ask.seconds_max for each in joiners),
            self._busy(now),
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
        held = self._index.held_by(node.node)
        plan = plan_warm(
            self._hotness.hottest(ask.family, PLAN_BLOCKS_MAX),
            lambda key: key in held,
            lambda key: self._donors(key, node),
            lambda name: self._members.description(name).may_be_read_from(node.host_id),
            ask.bytes_max,
            ask.seconds_max,
            self._busy(now),
        )
        self._give_work(plan, now)
        return Plan(ask.ask, plan.items, plan.present, None)

    def _busy(self, now: float) -> dict[str, float]:
        return {name: until - now for name, until in self._busy_until.items() if until > now}

    def _give_work(self, plan: WarmPlan, now: float) -> None:
        for name, seconds in plan.seconds.items():
            self._busy_until[name] = max(now, self._busy_until.get(name, now)) + seconds

    def _plan_singly(self, waiting: Iterable[Waiting], now: float) -> list[Command]:
        return [Send(each.connection, self._plan(self._members.at(each.connection), each.ask, now)) for each in waiting]

    def _hosts(self, key: bytes, joiners: list[NodeDescription]) -> list[Location]:
        """Where nodes have a block that can give it to all of these as a group: over TCP, from their own memory."""
        if not all(self._members.may_hold(node, key) for node in joiners):
            return []
        names = {node.node for node in joiners}
        found = self._index.locate([key], "", DONORS_MAX + len(names))[0]
        return [where for where in found if where.node not in names and self._can_host(where.node) and self._in_arena(where)]

    def _can_host(self, name: str) -> bool:
        node = self._members.description(name)
        return self._members.nodes[name].capable and name not in self._leavings and bool(node.endpoint) and not node.is_engine

    def _donors(self, key: bytes, node: NodeDescription) -> list[Location]:
        """Arenas, where blocks stay longer and reading disturbs no engine; engines and disks where no arena has the block."""
        if not self._members.may_hold(node, key):
            return []
        found = self._leavings.preferred(self._index.locate([key], node.node, DONORS_MAX)[0])
        return [where for where in found if self._in_arena(where)] or found

    def _in_arena(self, where: Location) -> bool:
        return self._members.description(where.node).kind_of(where.region) not in (DEVICE, DISK)
