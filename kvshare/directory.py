"""The cluster's directory as a pure state machine: events in, commands out, time is an argument.

    Connected ─> Heard(Join) ──────────> Welcome to it, NodeJoined to the others
                 Heard(Publish full) ──> its inventory is replaced
                 Heard(Publish) ───────> its inventory changes, if the sequence has no gap; else Resync
                 Heard(Find, AskPlan, Declare, AskDirectory) ──> an answer
                 Heard(Report) ────────> what is hot
                 Heard(AskPurge) ──────> Erase to all, Heard(Erased) ──> PurgeDone to the asker (`kvshare.purge_rounds`)
                 Heard(AskPlan ...) ───> Host to a donor, Heard(Hosted) ──> a Plan to each of a group (`kvshare.planning`)
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
    AskPurge,
    Beat,
    Declare,
    Declared,
    DirectoryStatus,
    Erased,
    Find,
    Found,
    Hosted,
    Join,
    Leave,
    NodeJoined,
    NodeLost,
    Publish,
    Report,
    Resync,
    Taken,
    Welcome,
)
from kvshare.config import Settings
from kvshare.directory_events import Broadcast, Close, Command, Connected, Disconnected, Event, Heard, Lost, Send, Tell, Tick
from kvshare.gate import TenantRegions
from kvshare.hotness import Hotness
from kvshare.index import Index, MemoryIndex
from kvshare.keys import KEY_BYTES_MAX, PREFIX_BYTES, Namespace
from kvshare.leaving import Leavings, Taker
from kvshare.members import Members, Peer
from kvshare.messages import PROTOCOL_VERSION, Message
from kvshare.places import DISK, Location, NodeDescription
from kvshare.planning import Planner
from kvshare.purge_rounds import PurgeRounds

HEARTBEATS_MISSED_MAX = 3
HOT_KEYS_MAX = 1 << 18  # at 16 tokens a block: the hottest four million tokens
FIND_KEYS_MAX = 1 << 16  # answered in one message; the rest is said to be unknown
FOUND_LOCATIONS_MAX = 3
NAMESPACES_MAX = 256  # the most recently declared
NAMESPACES_TOLD_MAX = 3


class _Misbehaved(Exception):
    """The connection broke the protocol; the text says how."""


class Directory:
    """See the module's docstring. ``epoch`` tells this start of the directory from others. ``tenants``: the regions that they
    are bound to; None: nobody is."""

    def __init__(
        self, settings: Settings, epoch: int = 1, index: Index | None = None, tenants: TenantRegions | None = None
    ) -> None:
        self._settings = settings
        self._epoch = epoch
        self._index: Index = MemoryIndex(settings.index_keys_max) if index is None else index
        self._hotness = Hotness(settings.hot_half_life_seconds, HOT_KEYS_MAX)
        self._patience_seconds = HEARTBEATS_MISSED_MAX * settings.heartbeat_seconds
        self._counters: Counter[str] = Counter()
        self._members = Members(tenants)
        self._leavings = Leavings(self._index, self._stays, self._takers, self._may_hold)
        self._planner = Planner(settings, self._index, self._hotness, self._members, self._leavings, self._counters)
        self._purges = PurgeRounds(epoch)
        self._namespaces: OrderedDict[bytes, Namespace] = OrderedDict()  # by family, latest last

    def next_deadline(self) -> float | None:
        """When the caller should `Tick` if nothing happens before; None while nobody is connected."""
        deadlines = [peer.heard + self._patience_seconds for peer in islice(self._members.peers.values(), 1)]
        return min(
            [*deadlines, *self._planner.deadlines(), *self._purges.deadlines(), *self._leavings.deadlines()], default=None
        )

    def status(self, ask: int = 0) -> DirectoryStatus:
        """Who is here and how much is known."""
        counters = {**self._counters, "locations": self._index.locations(), "hot_keys": len(self._hotness)}
        return DirectoryStatus(
            ask, self._epoch, list(map(self._members.description, self._members.nodes)), len(self._index), counters
        )

    def check(self) -> list[str]:
        """Problems found, one sentence each; empty when all is well."""
        problems = self._index.check() + self._hotness.check() + self._leavings.check()
        problems += [f"the index names {name}, which is not here" for name in self._index.nodes() - self._members.nodes.keys()]
        for name, peer in self._members.nodes.items():
            if self._members.peers.get(peer.connection) is not peer:
                problems.append(f"node {name} has no connection")
            if peer.description is None or peer.description.node != name:
                problems.append(f"node {name} is described as {peer.description}")
        joined = sum(peer.description is not None for peer in self._members.peers.values())
        if joined != len(self._members.nodes):
            problems.append(f"{joined} connections joined, {len(self._members.nodes)} nodes are known")
        problems += [f"connection {gone} waits for a group" for gone in self._planner.waiting() - self._members.peers.keys()]
        problems += [
            f"connection {gone} is part of a purge" for gone in self._purges.connections() - self._members.peers.keys()
        ]
        heard = [peer.heard for peer in self._members.peers.values()]
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
                assert connection not in self._members.peers
                self._members.peers[connection] = Peer(connection, now)
                return []
            case Disconnected(connection=connection):
                peer = self._members.peers.get(connection)
                return [] if peer is None else self._forget(peer)
            case Lost(node=name):
                peer = self._members.nodes.get(name)
                return [] if peer is None else self._part(peer, f"node {name} is said to be dead")
            case Tick():
                return self._tick(now)

    def _heard(self, connection: int, message: Message, now: float) -> list[Command]:
        peer = self._members.peers.get(connection)
        if peer is None:
            return []  # closed by us; this was on its way
        peer.heard = now
        self._members.peers.move_to_end(connection)
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

    def _heard_from_node(self, peer: Peer, node: NodeDescription, message: Message, now: float) -> list[Command]:
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
                return self._planner.ask(peer, message, now)
            case Hosted():
                return self._planner.hosted(peer, message, now)
            case AskPurge():
                return self._purge(peer, message, now)
            case Erased():
                return _sends(self._purges.erased(peer.connection, message))
            case Leave():
                self._counters["leaves"] += 1
                hottest = self._hotness.hottest_of(self._index.held_by(node.node))
                return self._leavings.begin(node.node, peer.connection, message, hottest, now)
            case Taken(ask=ask):
                return self._leavings.taken(node.node, ask, now)
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
        while self._members.peers and (peer := next(iter(self._members.peers.values()))).heard + self._patience_seconds <= now:
            commands += self._part(peer, f"{_name(peer)} was not heard of for {self._patience_seconds} s")
        return commands + self._planner.tick(now) + _sends(self._purges.overdue(now)) + self._leavings.tick(now)

    # --- who is here --------------------------------------------------------------------------------------------------

    def _join(self, peer: Peer, join: Join) -> list[Command]:
        if join.version != PROTOCOL_VERSION:
            raise _Misbehaved(f"speaks protocol {join.version}, we speak {PROTOCOL_VERSION}: run one version of kvshare")
        node, peer.capable = join.node, join.capable
        if peer.description is not None:
            return self._describe_anew(peer, peer.description, node)
        commands: list[Command] = []
        rival = self._members.nodes.get(node.node)
        if rival is not None:
            if node.epoch < self._members.description(node.node).epoch:
                # Were it a restart whose old connection lingers, the heartbeat ends that one soon.
                raise _Misbehaved(f"wants the name {node.node!r} of a later start: give every host its own 'node_name'")
            commands.append(Close(rival.connection, f"node {node.node} joined again on another connection"))
            self._remove(rival)
            commands += _sends(self._purges.leave(rival.connection))
        self._counters["joins"] += 1
        peer.description = node
        others = [self._members.description(name) for name in self._members.nodes]
        self._members.nodes[node.node] = peer
        purges = [] if node.is_engine else self._purges.missed(node.node)
        welcome = Send(peer.connection, Welcome(self._epoch, others, purges))
        return [*commands, welcome, *self._tell_others(peer, NodeJoined(node))]

    def _describe_anew(self, peer: Peer, known: NodeDescription, node: NodeDescription) -> list[Command]:
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

    def _part(self, peer: Peer, reason: str) -> list[Command]:
        """Forget a connection that is still open."""
        return [Close(peer.connection, reason), *self._forget(peer)]

    def _forget(self, peer: Peer) -> list[Command]:
        self._remove(peer)
        commands = _sends(self._purges.leave(peer.connection))
        if peer.description is None:
            return commands
        self._counters["losses"] += 1
        return commands + self._tell_others(peer, NodeLost(peer.description.node))

    def _remove(self, peer: Peer) -> None:
        del self._members.peers[peer.connection]
        self._planner.leave(peer)
        if peer.description is not None:
            name = peer.description.node
            assert self._members.nodes[name] is peer
            del self._members.nodes[name]
            self._index.drop(name)
            self._leavings.lose(name)

    def _stays(self, name: str) -> bool:
        return name in self._members.nodes and not self._members.description(name).is_engine

    def _may_hold(self, name: str, key: bytes) -> bool:
        return self._members.may_hold(self._members.description(name), key)

    def _takers(self, name: str) -> list[Taker]:
        """Who could read what this node holds."""
        source = self._members.description(name)
        return [
            Taker(other, peer.connection, peer.free_bytes)
            for other, peer in self._members.nodes.items()
            if other != name and self._stays(other) and source.may_be_read_from(self._members.description(other).host_id)
        ]

    def _tell_others(self, peer: Peer, message: Message) -> list[Command]:
        others = tuple(other.connection for other in self._members.nodes.values() if other is not peer)
        return [Broadcast(others, message)] if others else []

    # --- what they hold -----------------------------------------------------------------------------------------------

    def _publish(self, peer: Peer, node: NodeDescription, publish: Publish) -> list[Command]:
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
        peer.sequence, peer.free_bytes = publish.sequence, publish.free_bytes
        self._index.remove(node.node, publish.removed)
        refused = self._index.add(node.node, publish.stored)
        self._counters["refused"] += refused
        if not refused or self._counters["refused"] > refused:
            return []
        full = f"the directory is full (setting 'index_keys_max' is {self._settings.index_keys_max})"
        return [Tell(f"{full}: more blocks are not shared; raise it")]

    def _ask_all(self, peer: Peer) -> list[Command]:
        """Once for each gap; again with a heartbeat if it was in vain."""
        self._counters["resyncs"] += 1
        peer.sequence, peer.asked = None, peer.heard
        return [Send(peer.connection, Resync())]

    def _find(self, node: NodeDescription, wanted: list[bytes]) -> list[list[Location]]:
        self._counters["finds"] += 1
        found = self._index.locate(wanted[:FIND_KEYS_MAX], node.node, FOUND_LOCATIONS_MAX)
        found = [places if self._members.may_hold(node, key) else [] for key, places in zip(wanted, found, strict=False)]
        leaves = node.node in self._leavings
        found = [self._leavings.staying(places) if leaves else self._leavings.preferred(places) for places in found]
        for places in found:
            if len(places) > 1:
                places.sort(key=lambda where: self._distance(where, node))  # stable: freshest first in each
        return found + [[] for _ in wanted[FIND_KEYS_MAX:]]

    def _distance(self, where: Location, asker: NodeDescription) -> tuple[bool, bool]:
        """Memory before disk, and there the asker's own host first."""
        holder = self._members.description(where.node)
        return holder.kind_of(where.region) == DISK, holder.host_id != asker.host_id

    def _purge(self, peer: Peer, ask: AskPurge, now: float) -> list[Command]:
        """Nodes are asked, and empty the index by what they publish; an engine's part is its node's."""
        self._counters["purges"] += 1
        nodes = self._members.nodes.items()
        asked = {each.connection: name for name, each in nodes if not self._members.description(name).is_engine}
        return [Broadcast(tuple(asked), self._purges.begin(peer.connection, ask, asked, now))]

    def _declare(self, namespace: Namespace) -> list[Namespace]:
        """Remember a namespace; the nearest others, most alike first."""
        family = namespace.family()
        others = [other for known, other in self._namespaces.items() if known != family]
        self._namespaces[family] = namespace
        self._namespaces.move_to_end(family)
        if len(self._namespaces) > NAMESPACES_MAX:
            self._namespaces.popitem(last=False)
        return sorted(others, key=lambda other: len(namespace.differing(other)))[:NAMESPACES_TOLD_MAX]


def _sends(messages: Iterable[tuple[int, Message]]) -> list[Command]:
    return [Send(connection, message) for connection, message in messages]


def _name(peer: Peer) -> str:
    return f"connection {peer.connection}" if peer.description is None else f"node {peer.description.node}"


def _require_keys(keys: Iterable[bytes]) -> None:
    if not all(PREFIX_BYTES < len(key) <= KEY_BYTES_MAX for key in keys):
        raise _Misbehaved("sent a key of a length that no key has")
