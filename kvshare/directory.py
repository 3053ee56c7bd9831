"""The cluster's directory as a pure state machine: events in, commands out, time is an argument.

    Connected ─> Heard(Join) ──────────> Welcome to it, NodeJoined to the others
                 Heard(Publish full) ──> its inventory is replaced
                 Heard(Publish) ───────> its inventory changes, if the sequence has no gap; else Resync
                 Heard(Find, AskPlan, Declare, AskDirectory) ──> an answer
                 Heard(Report) ────────> what is hot
                 Heard(AskPlan ...) ───> Host to a donor, Heard(Hosted) ──> a Plan to each of a group (`kvshare.gathering`)
    Disconnected, Lost, Tick past the heartbeat ──> its inventory is forgotten, NodeLost to the others

Nothing here is kept anywhere else: a directory that starts anew is filled by its nodes within a publish of each. A stale
entry costs a reader one failed validation, so the directory may be late but must not be wrong for long: inventories follow
sequence numbers, and whoever ends a connection is forgotten at once (coming back means publishing everything again).

Events name connections, not nodes: a node may have two for a while, the broken one and its successor.

Threads: none; one caller. `kvshare.directory_server` puts sockets around it.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from itertools import islice

from kvshare.cluster_messages import (
    AskDirectory,
    AskPlan,
    Beat,
    Declare,
    Declared,
    DirectoryStatus,
    Find,
    Found,
    Hosted,
    Join,
    NodeJoined,
    NodeLost,
    Plan,
    Publish,
    Report,
    Resync,
    Welcome,
)
from kvshare.config import Settings
from kvshare.directory_events import Broadcast, Close, Command, Connected, Disconnected, Event, Heard, Lost, Send, Tell, Tick
from kvshare.gathering import Gatherings, Waiting
from kvshare.hotness import Hotness
from kvshare.index import Index, MemoryIndex
from kvshare.keys import KEY_BYTES_MAX, PREFIX_BYTES, Namespace
from kvshare.messages import PROTOCOL_VERSION, Message
from kvshare.places import Location, NodeDescription
from kvshare.plan import WarmPlan, plan_group, plan_warm

HEARTBEATS_MISSED_MAX = 3
HOT_KEYS_MAX = 1 << 18  # at 16 tokens a block: the hottest four million tokens
PLAN_BLOCKS_MAX = 1 << 15  # looked at for one plan
DONORS_MAX = 8  # to choose from for one block of a plan
FIND_KEYS_MAX = 1 << 16  # answered in one message; the rest is said to be unknown
FOUND_LOCATIONS_MAX = 3
NAMESPACES_MAX = 256  # the most recently declared
NAMESPACES_TOLD_MAX = 3


class _Peer:
    """A connection and, once it joined, its node."""

    def __init__(self, connection: int, heard: float) -> None:
        self.connection = connection
        self.heard = heard
        self.description: NodeDescription | None = None
        self.capable = False  # of being a group's donor
        self.sequence: int | None = None  # of its last publish; None: only a full one will do
        self.asked = heard  # when it was last asked for that


class _Misbehaved(Exception):
    """The connection broke the protocol; the text says how."""


class Directory:
    """See the module's docstring. ``epoch`` tells this start of the directory from others."""

    def __init__(self, settings: Settings, epoch: int = 1, index: Index | None = None) -> None:
        self._settings = settings
        self._epoch = epoch
        self._index: Index = MemoryIndex(settings.index_keys_max) if index is None else index
        self._hotness = Hotness(settings.hot_half_life_seconds, HOT_KEYS_MAX)
        self._patience_seconds = HEARTBEATS_MISSED_MAX * settings.heartbeat_seconds
        self._peers: OrderedDict[int, _Peer] = OrderedDict()  # by connection, longest unheard first
        self._nodes: dict[str, _Peer] = {}  # those that joined, by name
        self._gatherings = Gatherings(settings.warm_group_ranks, settings.warm_gather_seconds)
        self._busy_until: dict[str, float] = {}  # donors: when the plans made so far should be done
        self._namespaces: OrderedDict[bytes, Namespace] = OrderedDict()  # by family, latest last
        self._counters: Counter[str] = Counter()

    def next_deadline(self) -> float | None:
        """When the caller should `Tick` if nothing happens before; None while nobody is connected."""
        deadlines = [peer.heard + self._patience_seconds for peer in islice(self._peers.values(), 1)]
        return min([*deadlines, *self._gatherings.deadlines()], default=None)

    def status(self, ask: int = 0) -> DirectoryStatus:
        """Who is here and how much is known."""
        counters = {**self._counters, "locations": self._index.locations(), "hot_keys": len(self._hotness)}
        return DirectoryStatus(ask, self._epoch, list(map(self._description, self._nodes)), len(self._index), counters)

    def check(self) -> list[str]:
        """Problems found, one sentence each; empty when all is well."""
        problems = self._index.check() + self._hotness.check()
        problems += [f"the index names {name}, which is not here" for name in self._index.nodes() - self._nodes.keys()]
        for name, peer in self._nodes.items():
            if self._peers.get(peer.connection) is not peer:
                problems.append(f"node {name} has no connection")
            if peer.description is None or peer.description.node != name:
                problems.append(f"node {name} is described as {peer.description}")
        joined = sum(peer.description is not None for peer in self._peers.values())
        if joined != len(self._nodes):
            problems.append(f"{joined} connections joined, {len(self._nodes)} nodes are known")
        problems += [f"connection {gone} waits for a group" for gone in self._gatherings.connections() - self._peers.keys()]
        heard = [peer.heard for peer in self._peers.values()]
        if heard != sorted(heard):
            problems.append("connections are out of the order in which they were heard")
        return problems

    # --- events -------------------------------------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Command]:
        """Take one event; returns what is to be done, in this order. ``now`` in seconds, never going back."""
        match event:
            case Heard(connection=connection, message=message):
                return self._heard(connection, message, now)
            case Connected(connection=connection):
                assert connection not in self._peers
                self._peers[connection] = _Peer(connection, now)
                return []
            case Disconnected(connection=connection):
                peer = self._peers.get(connection)
                return [] if peer is None else self._forget(peer)
            case Lost(node=name):
                peer = self._nodes.get(name)
                return [] if peer is None else self._part(peer, f"node {name} is said to be dead")
            case Tick():
                return self._tick(now)

    def _heard(self, connection: int, message: Message, now: float) -> list[Command]:
        peer = self._peers.get(connection)
        if peer is None:
            return []  # closed by us; this was on its way
        peer.heard = now
        self._peers.move_to_end(connection)
        try:
            match message:
                case Join():
                    return self._join(peer, message)
                case AskDirectory(ask=ask):
                    return [Send(connection, self.status(ask))]
            if peer.description is None:
                raise _Misbehaved(f"sent {type(message).__name__} before it joined")
            return self._heard_from_node(peer, peer.description, message, now)
        except _Misbehaved as error:
            return self._part(peer, f"{_name(peer)} {error}")

    def _heard_from_node(self, peer: _Peer, node: NodeDescription, message: Message, now: float) -> list[Command]:
        match message:
            case Publish():
                return self._publish(peer, node, message)
            case Find(ask=ask, keys=wanted):
                return [Send(peer.connection, Found(ask, self._find(node, wanted)))]
            case Report(chains=chains):
                self._counters["reports"] += 1
                for chain in chains:
                    _require_keys(chain)
                    self._hotness.touch(chain, now)
                return []
            case AskPlan():
                return self._gather(peer, message, now)
            case Hosted():
                return self._hosted(peer, message, now)
            case Declare(ask=ask, namespace=namespace):
                return [Send(peer.connection, Declared(ask, self._declare(namespace)))]
            case Beat():
                overdue = peer.sequence is None and now - peer.asked >= self._settings.heartbeat_seconds
                return self._ask_all(peer) if overdue else []
        raise _Misbehaved(f"sent {type(message).__name__}, which is no message to a directory")

    def _tick(self, now: float) -> list[Command]:
        commands: list[Command] = []
        # next_deadline's own sum: a difference could round to just below the patience, and a caller that ticks at the
        # deadline would tick again and again.
        while self._peers and (peer := next(iter(self._peers.values()))).heard + self._patience_seconds <= now:
            commands += self._part(peer, f"{_name(peer)} was not heard of for {self._patience_seconds} s")
        return commands + self._plan_singly(self._gatherings.overdue(now), now)

    # --- who is here --------------------------------------------------------------------------------------------------

    def _join(self, peer: _Peer, join: Join) -> list[Command]:
        if join.version != PROTOCOL_VERSION:
            raise _Misbehaved(f"speaks protocol {join.version}, we speak {PROTOCOL_VERSION}: run one version of kvshare")
        node, peer.capable = join.node, join.capable
        if peer.description is not None:
            return self._describe_anew(peer, peer.description, node)
        commands: list[Command] = []
        rival = self._nodes.get(node.node)
        if rival is not None:
            if node.epoch < self._description(node.node).epoch:
                # Were it a restart whose old connection lingers, the heartbeat ends that one soon.
                raise _Misbehaved(f"wants the name {node.node!r} of a later start: give every host its own 'node_name'")
            commands.append(Close(rival.connection, f"node {node.node} joined again on another connection"))
            self._remove(rival)
        self._counters["joins"] += 1
        peer.description = node
        others = [self._description(name) for name in self._nodes]
        self._nodes[node.node] = peer
        return [*commands, Send(peer.connection, Welcome(self._epoch, others)), *self._tell_others(peer, NodeJoined(node))]

    def _describe_anew(self, peer: _Peer, known: NodeDescription, node: NodeDescription) -> list[Command]:
        if node.node != known.node:
            raise _Misbehaved(f"joined again as {node.node}")
        if node == known:
            return []
        peer.description = node
        commands = self._tell_others(peer, NodeJoined(node))
        if node.epoch != known.epoch:
            # What it published belongs to its old epoch.
            self._index.drop(node.node)
            commands += self._ask_all(peer)
        return commands

    def _part(self, peer: _Peer, reason: str) -> list[Command]:
        """Forget a connection that is still open."""
        return [Close(peer.connection, reason), *self._forget(peer)]

    def _forget(self, peer: _Peer) -> list[Command]:
        self._remove(peer)
        if peer.description is None:
            return []
        self._counters["losses"] += 1
        return self._tell_others(peer, NodeLost(peer.description.node))

    def _remove(self, peer: _Peer) -> None:
        del self._peers[peer.connection]
        self._gatherings.leave(peer.connection)
        if peer.description is not None:
            name = peer.description.node
            assert self._nodes[name] is peer
            del self._nodes[name]
            self._index.drop(name)
            self._busy_until.pop(name, None)

    def _description(self, name: str) -> NodeDescription:
        """Of a node that is here; the index names no others."""
        description = self._nodes[name].description
        assert description is not None
        return description

    def _tell_others(self, peer: _Peer, message: Message) -> list[Command]:
        others = tuple(other.connection for other in self._nodes.values() if other is not peer)
        return [Broadcast(others, message)] if others else []

    # --- what they hold -----------------------------------------------------------------------------------------------

    def _publish(self, peer: _Peer, node: NodeDescription, publish: Publish) -> list[Command]:
        if publish.node != node.node:
            raise _Misbehaved(f"publishes for {publish.node}")
        _require_keys(block.key for block in publish.stored)
        self._counters["publishes"] += 1
        if publish.full and publish.epoch == node.epoch:
            self._index.drop(node.node)
        elif peer.sequence is None:
            return []  # its full inventory is on its way
        elif publish.epoch != node.epoch or publish.sequence != peer.sequence + 1:
            return self._ask_all(peer)
        peer.sequence = publish.sequence
        self._index.remove(node.node, publish.removed)
        refused = self._index.add(node.node, publish.stored)
        self._counters["refused"] += refused
        if not refused or self._counters["refused"] > refused:
            return []
        full = f"the directory is full (setting 'index_keys_max' is {self._settings.index_keys_max})"
        return [Tell(f"{full}: more blocks are not shared; raise it")]

    def _ask_all(self, peer: _Peer) -> list[Command]:
        """Once for each gap; again with a heartbeat if it was in vain."""
        self._counters["resyncs"] += 1
        peer.sequence, peer.asked = None, peer.heard
        return [Send(peer.connection, Resync())]

    def _find(self, node: NodeDescription, wanted: list[bytes]) -> list[list[Location]]:
        self._counters["finds"] += 1
        found = self._index.locate(wanted[:FIND_KEYS_MAX], node.node, FOUND_LOCATIONS_MAX)
        for places in found:
            if len(places) > 1:
                # Stable: freshest first in each.
                places.sort(key=lambda where: self._description(where.node).host_id != node.host_id)
        return found + [[] for _ in wanted[FIND_KEYS_MAX:]]

    def _plan(self, node: NodeDescription, ask: AskPlan, now: float) -> Plan:
        self._counters["plans"] += 1
        held = self._index.held_by(node.node)
        plan = plan_warm(
            self._hotness.hottest(ask.family, PLAN_BLOCKS_MAX),
            lambda key: key in held,
            lambda key: self._donors(key, node),
            lambda name: self._description(name).may_be_read_from(node.host_id),
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

    def _gather(self, peer: _Peer, ask: AskPlan, now: float) -> list[Command]:
        """A plan of its own, unless it takes part in groups and something is hot: then it waits for others."""
        waiting = [Waiting(peer.connection, ask)]
        if not (ask.group and self._gatherings.ranks and self._hotness.hottest(ask.family, 1)):
            return self._plan_singly(waiting, now)
        joiners = self._gatherings.come(waiting[0], now)
        if not joiners:
            return []
        nodes = [self._joined(each) for each in joiners]
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
        donor = self._nodes[plan.items[0].location.node].connection
        return [Send(donor, self._gatherings.host(donor, joiners, plan.items, plan.present, now))]

    def _hosted(self, peer: _Peer, hosted: Hosted, now: float) -> list[Command]:
        plans, left_over = self._gatherings.hosted(peer.connection, hosted)
        self._counters["groups"] += bool(plans)
        commands: list[Command] = [Send(connection, plan) for connection, plan in plans]
        return commands + self._plan_singly(left_over, now)

    def _plan_singly(self, waiting: Iterable[Waiting], now: float) -> list[Command]:
        return [Send(each.connection, self._plan(self._joined(each), each.ask, now)) for each in waiting]

    def _joined(self, waiting: Waiting) -> NodeDescription:
        description = self._peers[waiting.connection].description
        assert description is not None
        return description

    def _hosts(self, key: bytes, joiners: list[NodeDescription]) -> list[Location]:
        """Where nodes have a block that can give it to all of these as a group: over TCP, from their own memory."""
        names = {node.node for node in joiners}
        found = self._index.locate([key], "", DONORS_MAX + len(names))[0]
        return [where for where in found if where.node not in names and self._can_host(where.node)]

    def _can_host(self, name: str) -> bool:
        node = self._description(name)
        return self._nodes[name].capable and bool(node.endpoint) and not node.is_engine

    def _donors(self, key: bytes, node: NodeDescription) -> list[Location]:
        """Arenas, where blocks stay longer and reading disturbs no engine; engines where nobody else has the block."""
        found = self._index.locate([key], node.node, DONORS_MAX)[0]
        return [where for where in found if not self._description(where.node).is_engine] or found

    def _declare(self, namespace: Namespace) -> list[Namespace]:
        """Remember a namespace; the nearest others, most alike first."""
        family = namespace.family()
        others = [other for known, other in self._namespaces.items() if known != family]
        self._namespaces[family] = namespace
        self._namespaces.move_to_end(family)
        if len(self._namespaces) > NAMESPACES_MAX:
            self._namespaces.popitem(last=False)
        return sorted(others, key=lambda other: len(namespace.differing(other)))[:NAMESPACES_TOLD_MAX]


def _name(peer: _Peer) -> str:
    return f"connection {peer.connection}" if peer.description is None else f"node {peer.description.node}"


def _require_keys(keys: Iterable[bytes]) -> None:
    if not all(PREFIX_BYTES < len(key) <= KEY_BYTES_MAX for key in keys):
        raise _Misbehaved("sent a key of a length that no key has")
