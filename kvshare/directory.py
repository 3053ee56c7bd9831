"""The cluster's directory as a pure state machine: events in, commands out, time is an argument.

    Connected ─> Heard(Join) ──────────> Welcome to it, NodeJoined to the others; Resync when it is its turn
                 Heard(Publish, Beat) ─> what it holds (`kvshare.inventories`), else Resync
                 Heard(Find) ──────────> Found (`kvshare.finding`)
                 Heard(Report) ────────> what is hot
                 Heard(AskPlan) ───────> a Plan; or Host to a donor, Heard(Hosted) ──> a Plan to each (`kvshare.planning`)
                 Heard(Leave) ─────────> Take to peers, Heard(Taken) ──> Left (`kvshare.leaving`)
                 Heard(AskPurge) ──────> Erase to all, Heard(Erased) ──> PurgeDone to the asker (`kvshare.purge_rounds`)
                 Heard(Declare, AskDirectory, AskNamespaces) ──> an answer; AskDepths ──> Depths (`kvshare.overlap`)
    Disconnected, Lost, Tick past the heartbeat ──> its inventory is forgotten, NodeLost to the others

A cluster has one of these, or several: shards, each complete for the keys that belong to it (`kvshare.fingerprints.shard_of`),
each with all nodes. What concerns the cluster as a whole, purges and namespaces, is the affair of shard 0.

Nothing here is kept anywhere else: a directory that starts anew is filled by its nodes within a publish of each. A stale
entry costs a reader one failed validation, so the directory may be late but must not be wrong for long: inventories follow
sequence numbers, and whoever ends a connection is forgotten at once (coming back means publishing everything again).

Events name connections, not nodes: a node may have two for a while, the broken one and its successor. Whoever sends what
cannot be is closed, with a reason; everything else goes on.

Threads: none; one caller. `kvshare.directory_server` puts sockets around it.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Iterable
from itertools import islice

from kvshare.cluster_messages import (
    AskDepths,
    AskDirectory,
    AskNamespaces,
    AskPlan,
    AskPurge,
    Beat,
    Declare,
    Declared,
    Depths,
    DirectoryStatus,
    Erased,
    Find,
    Found,
    Hosted,
    Join,
    Leave,
    Namespaces,
    NodeJoined,
    NodeLost,
    Publish,
    Report,
    Taken,
    Welcome,
)
from kvshare.config import Settings
from kvshare.directory_events import Broadcast, Close, Command, Connected, Disconnected, Event, Heard, Lost, Send, Tell, Tick
from kvshare.finding import Finder
from kvshare.fingerprints import ALL_PARTS, index_seed
from kvshare.gate import TenantRegions
from kvshare.hotness import Hotness
from kvshare.index import CompactIndex, Index
from kvshare.inventories import Inventories
from kvshare.keys import Namespace
from kvshare.leaving import Leavings, Taker
from kvshare.members import Members, Misbehaved, Peer, require_keys
from kvshare.messages import PROTOCOL_VERSION, Message
from kvshare.overlap import held_by
from kvshare.places import NodeDescription
from kvshare.planning import Planner
from kvshare.purge_rounds import PurgeRounds

HEARTBEATS_MISSED_MAX = 3
LATE_SECONDS_MIN = 1.0  # a tick that comes so much too late, or a heartbeat: it was the directory that slept
LATE_HEARTBEATS = 1.5  # then everybody is given time for one more heartbeat and its way
ROUNDING_SECONDS = 1e-6
HOT_KEYS_MAX = 1 << 18  # at 16 tokens a block: the hottest four million tokens
NAMESPACES_MAX = 256  # the most recently declared
NAMESPACES_TOLD_MAX = 3


class Directory:
    """See the module's docstring. ``epoch`` tells this start of the directory from others. ``tenants``: the regions that they
    are bound to; None: nobody is. ``shard`` of ``shards``: which of them this is."""

    def __init__(
        self,
        settings: Settings,
        epoch: int = 1,
        index: Index | None = None,
        tenants: TenantRegions | None = None,
        shard: int = 0,
        shards: int = 1,
    ) -> None:
        assert 0 <= shard < shards
        self._settings = settings
        self._epoch = epoch
        self._shard, self._shards = shard, shards
        if index is None:
            index = CompactIndex(settings.index_keys_max, index_seed(settings.secret))
        self._index: Index = index
        self._clock = _Clock()
        self._hotness = Hotness(settings.hot_half_life_seconds, HOT_KEYS_MAX)
        self._patience_seconds = HEARTBEATS_MISSED_MAX * settings.heartbeat_seconds
        self._counters: Counter[str] = Counter()
        self._members = Members(tenants)
        self._inventories = Inventories(self._index, self._counters, settings.index_keys_max)
        self._leavings = Leavings(self._index, self._stays, self._takers, self._may_hold)
        self._finder = Finder(self._index, self._members, self._leavings)
        self._planner = Planner(settings, self._index, self._hotness, self._members, self._leavings, self._counters)
        self._purges = PurgeRounds(epoch)
        self._namespaces: OrderedDict[bytes, Namespace] = OrderedDict()  # by family, latest last

    def next_deadline(self) -> float | None:
        """When the caller should `Tick` if nothing happens before; None while there is nothing to wait for."""
        deadlines = [peer.heard + self._patience_seconds for peer in islice(self._members.peers.values(), 1)]
        for part in (self._inventories, self._planner, self._purges, self._leavings):
            deadlines += part.deadlines()
        return self._clock.of_caller(min(deadlines)) if deadlines else None

    def status(self, ask: int = 0) -> DirectoryStatus:
        """Who is here and how much is known."""
        counters = {
            **self._counters,
            "locations": self._index.locations(),
            "hot_keys": len(self._hotness),
            "inventories_waiting": self._inventories.waiting,
        }
        return DirectoryStatus(
            ask, self._epoch, list(map(self._members.description, self._members.nodes)), len(self._index), counters
        )

    def check(self) -> list[str]:
        """Problems found, one sentence each; empty when all is well."""
        parts = (self._index, self._hotness, self._members, self._inventories, self._leavings)
        problems = [problem for part in parts for problem in part.check()]
        problems += [f"the index names {name}, which is not here" for name in self._index.nodes() - self._members.nodes.keys()]
        problems += [f"connection {gone} waits for a group" for gone in self._planner.waiting() - self._members.peers.keys()]
        problems += [
            f"connection {gone} is part of a purge" for gone in self._purges.connections() - self._members.peers.keys()
        ]
        return problems

    # --- events -------------------------------------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Command]:
        """Take one event; returns what is to be done, in this order. ``now`` in seconds; where it goes back, time goes on from
        the latest that was given."""
        back = self._clock.take(now)
        said: list[Command] = [Tell("the directory's clock went back: time goes on from where it was")] if back else []
        return said + self._handle(event, self._clock.now)

    def _handle(self, event: Event, now: float) -> list[Command]:
        match event:
            case Heard(connection=connection, message=message):
                return self._heard(connection, message, now)
            case Connected(connection=connection):
                assert connection not in self._members.peers
                self._members.peers[connection] = Peer(connection, now)
                return []
            case Disconnected(connection=connection):
                peer = self._members.peers.get(connection)
                return [] if peer is None else self._forget(peer, now)
            case Lost(node=name):
                peer = self._members.nodes.get(name)
                return [] if peer is None else self._part(peer, f"node {name} is said to be dead", now)
            case Tick():
                return self._tick(now)

    def _heard(self, connection: int, message: Message, now: float) -> list[Command]:
        peer = self._members.peers.get(connection)
        if peer is None:
            return []  # closed by us; this was on its way
        self._members.heard(peer, now)
        try:
            match message:
                case Join():
                    return self._join(peer, message, now)
                case AskDirectory(ask=ask):
                    return [Send(connection, self.status(ask))]
                case AskNamespaces(ask=ask):
                    return [Send(connection, Namespaces(ask, list(self._namespaces.values())))]
                case AskDepths(ask=ask, keys=wanted):
                    require_keys(message, wanted)
                    self._counters["depths"] += bool(wanted)
                    return [Send(connection, Depths(ask, held_by(self._index, wanted, self._kind_of)))]
            if peer.description is None:
                raise Misbehaved(f"sent {type(message).__name__} before it joined")
            return self._heard_from_node(peer, peer.description, message, now)
        except Misbehaved as error:
            return self._part(peer, f"{peer.name} {error}", now)

    def _heard_from_node(self, peer: Peer, node: NodeDescription, message: Message, now: float) -> list[Command]:
        match message:
            case Publish():
                return self._inventories.publish(peer, message, now)
            case Beat():
                return self._inventories.beat(peer, message, now)
            case Find(ask=ask, keys=wanted):
                require_keys(message, wanted)
                self._counters["finds"] += 1
                return [Send(peer.connection, Found(ask, self._finder.find(node, wanted)))]
            case Report(chains=chains):
                self._counters["reports"] += 1
                for chain in chains:
                    if not chain.well_formed():
                        raise Misbehaved("sent a Report of a malformed chain")
                    self._hotness.touch(chain, now)
                return []
            case AskPlan():
                return self._planner.ask(peer, message, now)
            case Hosted():
                return self._planner.hosted(peer, message, now)
            case Erased():
                return _sends(self._purges.erased(peer.connection, message))
            case Leave():
                return self._leave(peer, node.node, message, now)
            case Taken(ask=ask):
                return self._leavings.taken(node.node, ask, now)
            case AskPurge() | Declare() if self._shard != 0:
                raise Misbehaved(f"sent {type(message).__name__} to shard {self._shard}: that is the affair of shard 0")
            case AskPurge():
                return self._purge(peer, message, now)
            case Declare(ask=ask, namespace=namespace):
                return [Send(peer.connection, Declared(ask, self._declare(namespace)))]
        raise Misbehaved(f"sent {type(message).__name__}, which is no message to a directory")

    def _tick(self, now: float) -> list[Command]:
        commands: list[Command] = []
        peers = self._members.peers
        if peers:
            late = now - next(iter(peers.values())).heard - self._patience_seconds
            if late > max(LATE_SECONDS_MIN, self._settings.heartbeat_seconds):
                # What the others said meanwhile lies in our sockets; the connections of the dead end by themselves.
                self._members.heard_all(now - self._patience_seconds + LATE_HEARTBEATS * self._settings.heartbeat_seconds)
                commands.append(Tell(f"the directory slept for {late:.0f} s, or its clock jumped: nobody counts as dead yet"))
        # next_deadline's own sum: a difference could round to just below the patience, and a caller that ticks at the
        # deadline would tick again and again.
        while peers and (peer := next(iter(peers.values()))).heard + self._patience_seconds <= now:
            commands += self._part(peer, f"{peer.name} was not heard of for {self._patience_seconds} s", now)
        commands += self._inventories.tick(now) + self._planner.tick(now)
        return commands + _sends(self._purges.overdue(now)) + self._leavings.tick(now)

    # --- who is here --------------------------------------------------------------------------------------------------

    def _join(self, peer: Peer, join: Join, now: float) -> list[Command]:
        if join.version != PROTOCOL_VERSION:
            raise Misbehaved(f"speaks protocol {join.version}, we speak {PROTOCOL_VERSION}: run one version of kvshare")
        if (join.shard, join.shards) != (self._shard, self._shards):
            raise Misbehaved(
                f"takes this for shard {join.shard} of {join.shards}, it is shard {self._shard} of {self._shards}: name all "
                "shards in their order on every host (setting 'directory')"
            )
        node, peer.capable = join.node, join.capable
        self._finder.changed()
        if peer.description is not None:
            return self._describe_anew(peer, peer.description, node, now)
        commands: list[Command] = []
        rival = self._members.nodes.get(node.node)
        if rival is not None:
            if node.epoch < self._members.description(node.node).epoch:
                # Were it a restart whose old connection lingers, the heartbeat ends that one soon.
                raise Misbehaved(f"wants the name {node.node!r} of a later start: give every host its own 'node_name'")
            commands.append(Close(rival.connection, f"node {node.node} joined again on another connection"))
            commands += self._remove(rival, now)
        self._counters["joins"] += 1
        peer.description = node
        others = [self._members.description(name) for name in self._members.nodes]
        self._members.nodes[node.node] = peer
        purges = [] if node.is_engine else self._purges.missed(node.node)
        commands.append(Send(peer.connection, Welcome(self._epoch, others, purges)))
        return commands + self._tell_others(peer, NodeJoined(node)) + self._inventories.want(peer, ALL_PARTS, now)

    def _describe_anew(self, peer: Peer, known: NodeDescription, node: NodeDescription, now: float) -> list[Command]:
        if node.node != known.node:
            raise Misbehaved(f"joined again as {node.node}")
        if node == known:
            return []
        peer.description = node
        commands = self._tell_others(peer, NodeJoined(node))
        if node.epoch != known.epoch:
            # What it published belongs to its old epoch.
            self._inventories.forget(node.node, now)
            commands += self._inventories.want(peer, ALL_PARTS, now)
        return commands

    def _part(self, peer: Peer, reason: str, now: float) -> list[Command]:
        """Forget a connection that is still open."""
        return [Close(peer.connection, reason), *self._forget(peer, now)]

    def _forget(self, peer: Peer, now: float) -> list[Command]:
        commands = self._remove(peer, now)
        if peer.description is None:
            return commands
        self._counters["losses"] += 1
        return self._tell_others(peer, NodeLost(peer.description.node)) + commands

    def _remove(self, peer: Peer, now: float) -> list[Command]:
        """It is gone; returns what that means to those who waited for it."""
        del self._members.peers[peer.connection]
        self._planner.leave(peer)
        self._finder.changed()
        if peer.description is not None:
            name = peer.description.node
            assert self._members.nodes[name] is peer
            del self._members.nodes[name]
            self._leavings.lose(name, now)
        return self._inventories.leave(peer, now) + _sends(self._purges.leave(peer.connection))

    def _leave(self, peer: Peer, name: str, leave: Leave, now: float) -> list[Command]:
        require_keys(leave, leave.keys)
        told = self._leavings.told(name, leave)
        if told is None:
            return []
        self._counters["leaves"] += 1
        self._finder.changed()
        hottest = self._hotness.hottest_of(set(told))
        return self._leavings.begin(name, peer.connection, leave, list(dict.fromkeys([*hottest, *told])), now)

    def _stays(self, name: str) -> bool:
        return name in self._members.nodes and not self._members.description(name).is_engine

    def _kind_of(self, name: str, region: int) -> str:
        return self._members.description(name).kind_of(region)

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

    # --- what concerns the cluster as a whole -------------------------------------------------------------------------

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


class _Clock:
    """Time that never goes back, made of one that may."""

    def __init__(self) -> None:
        self.now = float("-inf")
        self._ahead = 0.0  # of the caller's clock

    def take(self, now: float) -> bool:
        """The caller's clock stands there. True when it went back."""
        back = self.now - (now + self._ahead)
        if back > ROUNDING_SECONDS:
            self._ahead += back
        self.now = max(self.now, now + self._ahead)
        return back > ROUNDING_SECONDS

    def of_caller(self, moment: float) -> float:
        """What the caller's clock shows at that moment, or just behind it: a caller that ticks then is not too early."""
        shown = moment - self._ahead
        while shown + self._ahead < moment:
            shown = math.nextafter(shown, math.inf)
        return shown
