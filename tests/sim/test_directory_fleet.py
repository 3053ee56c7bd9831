"""A fleet against the directory, without sockets or clocks.

Goal: whatever happens in whatever order (joins, losses, gaps, duplicates, restarts, deaths loud and silent, two connections of
one node), once it is quiet the directory knows exactly what the living hold, everybody knows who lives, and on the way no
answer names the dead and no plan exceeds its bytes. Method: a seeded simulation; time is a heap of events; nodes behave as
`kvshare.link` does. A failure prints its seed, and the same seed plays the same play.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from kvshare import keys
from kvshare.cluster_messages import (
    AskPlan,
    Beat,
    Find,
    Found,
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
from kvshare.directory import Directory
from kvshare.directory_events import Broadcast, Close, Connected, Disconnected, Event, Heard, Lost, Send, Tell, Tick
from kvshare.index import MemoryIndex
from kvshare.messages import PROTOCOL_VERSION, Message
from kvshare.places import NodeDescription, Stored

HEARTBEAT_SECONDS = 5.0
BATCH_BLOCKS = 8  # of a publish: small, so that inventories travel in several
LENGTH = 1 << 20
FAMILY = b"s" * keys.FAMILY_BYTES
PREFIX = keys.prefix(FAMILY)


def chain(number: int) -> list[bytes]:
    """One of the fleet's prompts; four share a head of half their length."""
    length = 6 + number % 7
    return [PREFIX + b"%d/%d" % (number // 4 if depth < length // 2 else number, depth) for depth in range(length)]


@dataclass
class Node:
    """What a node is to the directory: an inventory and a connection."""

    name: str
    epoch: int = 0
    connection: int | None = None
    alive: bool = False
    welcomed: bool = False
    sequence: int = 0
    generations: int = 0
    inventory: dict[bytes, Stored] = field(default_factory=dict)
    peers: set[str] = field(default_factory=set)

    def describe(self) -> NodeDescription:
        return NodeDescription(self.name, self.epoch, f"host of {self.name}", "10.0.0.1:1", ())

    def store(self, key: bytes) -> Stored:
        self.generations += 2
        block = Stored(key, LENGTH, self.generations // 2, self.epoch << 32 | self.generations, LENGTH)
        self.inventory[key] = block
        return block

    def publish(self, stored: list[Stored], removed: list[bytes], full: bool = False) -> Publish:
        self.sequence += 1
        return Publish(self.name, self.epoch, self.sequence, full, stored, removed, 0)

    def publish_all(self) -> list[Publish]:
        blocks = list(self.inventory.values())
        return [
            self.publish(blocks[start : start + BATCH_BLOCKS], [], full=start == 0)
            for start in range(0, max(1, len(blocks)), BATCH_BLOCKS)
        ]


class Fleet:
    """Nodes, a directory and the network between them. ``faults``: share of publishes that get lost or come twice."""

    def __init__(self, seed: int, nodes: int, prompts: int, faults: float) -> None:
        print(f"seed {seed}")
        self.random = random.Random(seed)
        self.index = MemoryIndex(1_000_000)
        self.directory = Directory(Settings.load({"heartbeat_seconds": HEARTBEAT_SECONDS}, {}), index=self.index)
        self.nodes = {f"n{i}": Node(f"n{i}") for i in range(nodes)}
        self.by_connection: dict[int, Node] = {}
        self.prompts = prompts
        self.faults = faults
        self.now = 0.0
        self.queue: list[tuple[float, int, Callable[[], None]]] = []
        self.numbers = itertools.count()
        self.connections = itertools.count(1)
        self.arrivals: dict[int, float] = {}  # a connection delivers in order
        self.plans = self.finds = self.resyncs = 0
        self.history = hashlib.sha256()

    # --- time ---------------------------------------------------------------------------------------------------------

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self.queue, (self.now + seconds, next(self.numbers), action))

    def run(self, until: float) -> None:
        while True:
            deadline = self.directory.next_deadline()
            moment = min(self.queue[0][0] if self.queue else until, until if deadline is None else deadline)
            if moment >= until:
                break
            self.now = max(self.now, moment)
            if deadline is not None and deadline <= self.now:
                self.feed(Tick())
                assert self.directory.next_deadline() != deadline, "a tick in vain would be repeated for ever"
            else:
                heapq.heappop(self.queue)[2]()
        self.now = until

    # --- the network --------------------------------------------------------------------------------------------------

    def feed(self, event: Event) -> None:
        self.history.update(repr((round(self.now, 6), event)).encode())
        for command in self.directory.handle(event, self.now):
            match command:
                case Send(connection=connection, message=message):
                    self.deliver((connection,), message)
                case Broadcast(connections=connections, message=message):
                    self.deliver(connections, message)
                case Close(connection=connection):
                    self.later(self.random.uniform(0.0, 0.01), lambda connection=connection: self.cut(connection))  # type: ignore[misc]
                case Tell(text=text):
                    raise AssertionError(text)

    def deliver(self, connections: tuple[int, ...], message: Message) -> None:
        """Nothing overtakes on a connection, so everything from the directory takes equally long."""

        def arrive() -> None:
            for connection in connections:
                node = self.by_connection.get(connection)
                if node is not None:
                    self.receive(node, message)

        self.later(0.002, arrive)

    def send(self, node: Node, message: Message) -> None:
        connection = node.connection
        if connection is None:
            return
        copies = 1
        if isinstance(message, Publish) and self.random.random() < self.faults:
            copies = self.random.choice((0, 2))
        arrival = max(self.now + self.random.uniform(0.0, 0.01), self.arrivals.get(connection, 0.0))
        self.arrivals[connection] = arrival
        for _ in range(copies):
            self.later(arrival - self.now, lambda: self.feed(Heard(connection, message)))

    def connect(self, node: Node) -> None:
        if not node.alive or node.connection is not None:
            return
        connection = node.connection = next(self.connections)
        self.by_connection[connection] = node
        self.arrivals[connection] = self.now + 0.001
        self.later(0.001, lambda: self.feed(Connected(connection)))
        self.send(node, Join(PROTOCOL_VERSION, node.describe(), False))
        self.beat(node, connection)

    def beat(self, node: Node, connection: int) -> None:
        if node.connection == connection:
            self.send(node, Beat())
            self.later(HEARTBEAT_SECONDS, lambda: self.beat(node, connection))

    def cut(self, connection: int, heard: bool = True) -> None:
        """A connection ends; unless its host vanished, the directory hears of it. The node, if alive, comes back."""
        node = self.by_connection.pop(connection, None)
        if node is None:
            return
        if node.connection == connection:
            node.connection, node.welcomed = None, False
            self.later(self.random.uniform(0.1, 2.0), lambda: self.connect(node))
        if heard:
            seconds = max(0.0, self.arrivals[connection] - self.now)
            self.later(seconds, lambda: self.feed(Disconnected(connection)))

    def receive(self, node: Node, message: Message) -> None:
        match message:
            case Welcome(nodes=others):
                node.peers = {other.node for other in others}
                node.welcomed = True
                self.publish_all(node)
            case NodeJoined(node=other):
                node.peers.add(other.node)
            case NodeLost(node=name):
                node.peers.discard(name)
            case Resync():
                self.resyncs += 1
                self.publish_all(node)
            case Found() | Plan():
                pass  # looked at when it was made
            case _:
                raise AssertionError(message)

    def publish_all(self, node: Node) -> None:
        for publish in node.publish_all():
            self.send(node, publish)

    # --- what happens -------------------------------------------------------------------------------------------------

    def start(self, node: Node) -> None:
        """A first start, or a restart that recovers most of its arena."""
        if node.alive:
            return
        node.alive = True
        node.epoch += 1
        kept = [key for key in node.inventory if self.random.random() < 0.8]
        node.inventory = {}
        for key in kept:
            node.store(key)
        self.connect(node)

    def die(self, node: Node) -> None:
        """Loudly (the kernel closes its socket), silently (the host is gone), or with a supervisor that saw it."""
        node.alive = False
        how = self.random.choice(("loud", "silent", "seen"))
        if node.connection is not None:
            self.cut(node.connection, heard=how == "loud")
        if how == "seen":
            self.later(0.5, lambda: self.feed(Lost(node.name)) if not node.alive else None)

    def blink(self, node: Node) -> None:
        """The network drops a connection of which the directory does not hear: the node has two for a while."""
        if node.connection is not None:
            self.cut(node.connection, heard=False)

    def work(self, node: Node) -> None:
        """Serve a prompt: look it up, save its blocks, evict others; all told to the directory."""
        blocks = chain(min(int(self.random.expovariate(8.0) * self.prompts), self.prompts - 1))
        stored = [node.store(key) for key in blocks if key not in node.inventory]
        spare = [key for key in node.inventory if key not in blocks]
        removed = self.random.sample(spare, min(len(spare), self.random.choice((0, 0, 2, 9))))
        for key in removed:
            del node.inventory[key]
        if node.welcomed:
            for start in range(0, max(len(stored), len(removed)), BATCH_BLOCKS):
                part = slice(start, start + BATCH_BLOCKS)
                self.send(node, node.publish(stored[part], removed[part]))
            self.send(node, Report([blocks]))

    def ask(self, node: Node) -> None:
        """A question is answered at once, so the answer can be compared with what the directory knows."""
        if node.connection is None or not node.welcomed:
            return
        here = {known.node for known in self.directory.status().nodes}
        if node.name not in here:
            return
        held = set(self.index.held_by(node.name))
        bytes_max = self.random.randrange(40) * LENGTH
        wanted = chain(self.random.randrange(self.prompts))
        (found,) = self.directory.handle(Heard(node.connection, Find(1, wanted)), self.now)
        (made,) = self.directory.handle(Heard(node.connection, AskPlan(2, FAMILY, bytes_max, 30.0, False)), self.now)
        assert isinstance(found, Send) and isinstance(found.message, Found)
        assert isinstance(made, Send) and isinstance(made.message, Plan)
        named = {where.node for places in found.message.locations for where in places}
        assert named <= here - {node.name}
        items = made.message.items
        assert {item.location.node for item in items} <= here - {node.name}
        assert sum(item.location.length for item in items) <= bytes_max
        assert not {item.key for item in items} & held
        usable = held | {item.key for item in items}
        assert all(parent_of(item.key, usable) for item in items)
        self.finds += bool(named)
        self.plans += bool(items)

    def live(self, seconds: float, actions: int, deaths: bool = True) -> None:
        """``actions`` things happen at random moments of the next ``seconds``."""
        everyone = list(self.nodes.values())
        for _ in range(actions):
            node = self.random.choice(everyone)
            what = self.random.choices((self.work, self.ask, self.die, self.blink, self.start), (60, 15, 4 * deaths, 2, 8))[0]
            happens = self.random.uniform(0.0, seconds)
            self.later(happens, lambda node=node, what=what: what(node) if node.alive or what == self.start else None)  # type: ignore[misc]
        self.run(self.now + seconds)

    def quieten(self) -> None:
        """No more faults; everyone alive says one last thing, since a lost last word shows at the next one only."""
        self.faults = 0.0
        self.run(self.now + 4 * HEARTBEAT_SECONDS)
        for node in self.nodes.values():
            if node.welcomed:
                self.send(node, node.publish([], []))
        self.run(self.now + HEARTBEAT_SECONDS)

    def verify(self) -> None:
        assert not self.directory.check()
        alive = {node.name for node in self.nodes.values() if node.alive}
        assert {known.node for known in self.directory.status().nodes} == alive
        assert self.index.nodes() <= alive
        for node in self.nodes.values():
            if not node.alive:
                assert not self.index.held_by(node.name)
                continue
            assert node.peers == alive - {node.name}
            assert self.index.held_by(node.name) == node.inventory.keys()
        for key in {key for node in self.nodes.values() for key in node.inventory}:
            known = {(where.node, where.slot, where.generation) for where in self.index.locate([key], "", len(self.nodes))[0]}
            assert known == {
                (node.name, node.inventory[key].slot, node.inventory[key].generation)
                for node in self.nodes.values()
                if node.alive and key in node.inventory
            }


def parent_of(key: bytes, usable: set[bytes]) -> bool:
    """Is the block before ``key`` usable? At the end of a shared head that may be any of its four prompts."""
    number, depth = map(int, keys.hash_of(key).split(b"/"))
    if depth == 0:
        return True
    return any(key in blocks and blocks[depth - 1] in usable for blocks in map(chain, candidates(number)))


def candidates(number: int) -> set[int]:
    return {number, *range(number * 4, number * 4 + 4)}


@pytest.mark.parametrize("seed", range(6))
def test_after_any_storm_the_directory_knows_what_the_living_hold_and_everyone_who_lives(seed: int) -> None:
    fleet = Fleet(seed, nodes=60, prompts=80, faults=0.05)
    for node in fleet.nodes.values():
        fleet.start(node)
    for _ in range(4):
        fleet.live(15.0, 500)
        assert not fleet.directory.check()
    fleet.quieten()
    fleet.verify()
    # The storm was one: gaps were found, questions had answers.
    assert fleet.resyncs > 0 and fleet.finds > 0 and fleet.plans > 0


def test_a_fleet_of_a_thousand_arrives_at_once_and_loses_a_third() -> None:
    fleet = Fleet(seed=1000, nodes=1000, prompts=400, faults=0.01)
    for node in fleet.nodes.values():
        fleet.later(fleet.random.uniform(0.0, 1.0), lambda node=node: fleet.start(node))  # type: ignore[misc]
    fleet.live(5.0, 1500, deaths=False)
    for node in fleet.random.sample(list(fleet.nodes.values()), 333):
        fleet.die(node)
    fleet.quieten()
    fleet.verify()
    assert sum(node.alive for node in fleet.nodes.values()) == 667


def test_the_same_seed_plays_the_same_play() -> None:
    def played(seed: int) -> str:
        fleet = Fleet(seed, nodes=20, prompts=30, faults=0.1)
        for node in fleet.nodes.values():
            fleet.start(node)
        fleet.live(20.0, 300)
        return fleet.history.hexdigest()

    assert played(7) == played(7)
    assert played(7) != played(8)
