"""A node's connection to one shard of the directory in a simulated cluster: what `kvshare.link` is around the real `Outbox`.

    dial ─> Join ─> Welcome ─> Resync ─> Publish ...       asks ─> answers, each within its time
      ^                                                    alarms ─> Beat
      └──── a pause ──── the connection is lost

Threads: none.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from kvshare.cluster_messages import (
    Found,
    FromDirectory,
    Join,
    Left,
    NodeJoined,
    NodeLost,
    Plan,
    Publish,
    PurgeDone,
    Resync,
    Welcome,
)
from kvshare.messages import PROTOCOL_VERSION, Message
from kvshare.outbox import Outbox
from kvshare.places import NodeDescription
from tests.sim.network import NODE, SHARD, Connection, Network
from tests.sim.shards import Shard
from tests.sim.world import World

HEARTBEAT_SECONDS = 5.0
PUBLISH_SECONDS = 0.02
PAUSES = (0.1, 2.0)  # before the next attempt
TAKEN_AT_ONCE, TAKING_SECONDS = 3, 0.004  # messages that the connection takes before it needs a moment

Then = Callable[[Any], None]


class Owner(Protocol):
    """The node, as its links see it."""

    name: str
    epoch: int

    def describe(self) -> NodeDescription: ...
    def room(self) -> int: ...
    def told(self, link: Link, message: Message) -> None: ...


class Link:
    """``lossy``: share of publishes that are lost or come twice, as by a fault of our own code."""

    def __init__(self, world: World, network: Network, owner: Owner, shard: Shard, shards: int, outbox: Outbox) -> None:
        self._world = world
        self._network = network
        self._owner = owner
        self.name = owner.name
        self.shard = shard
        self._shards = shards
        self.outbox = outbox
        self.lossy = 0.0
        self.connection: Connection | None = None
        self.welcomed = False
        self.peers: dict[str, NodeDescription] = {}
        self._pending: dict[int, Then] = {}
        self._asks = itertools.count(1)
        self._pumping = False
        self._ended = False
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(FromDirectory)
        self.dial()

    # --- its life -----------------------------------------------------------------------------------------------------

    def dial(self) -> None:
        if not self._ended and self.connection is None:
            self._network.dial(self, self.shard)

    def connected(self, connection: Connection) -> None:
        if self._ended or self.connection is not None:
            self._network.end(connection, NODE)
            return
        self.connection = connection
        self.join()
        self._world.soon(0.0, HEARTBEAT_SECONDS, lambda: self._beat(connection))

    def refused(self, shard: int) -> None:
        self._world.soon(*PAUSES, self.dial)

    def lost(self, connection: Connection) -> None:
        if self.connection is connection:
            self._forget()
            self._world.soon(*PAUSES, self.dial)

    def end(self, loud: bool) -> None:
        """The node is gone; unless ``loud``, with its host."""
        self._ended = True
        if self.connection is not None:
            if loud:
                self._network.end(self.connection, NODE)
            else:
                self._network.vanish(self.connection, NODE)
            self._forget()

    def blink(self) -> None:
        """The connection breaks, of which the shard does not hear: soon it has two of this node."""
        if self.connection is not None:
            self._network.sever(self.connection, 0.0, None)

    def _forget(self) -> None:
        self.connection, self.welcomed = None, False
        self.peers.clear()
        self.outbox.forget()
        pending, self._pending = self._pending, {}
        for then in pending.values():
            then(None)

    # --- what is said -------------------------------------------------------------------------------------------------

    def join(self) -> None:
        self._send(Join(PROTOCOL_VERSION, self._owner.describe(), False, self.shard.number, self._shards))

    def ask(self, make: Callable[[int], Message], seconds: float, then: Then) -> None:
        """``then`` gets the answer, or None: soon where nobody is asked, after so many seconds at the latest."""
        connection = self.connection
        if connection is None or not self.welcomed:
            then(None)
            return
        number = next(self._asks)
        self._pending[number] = then
        self._send(make(number))
        self._world.later(seconds, lambda: self._give_up(connection, number))

    def _give_up(self, connection: Connection, number: int) -> None:
        then = self._pending.pop(number, None) if connection is self.connection else None
        if then is not None:
            self._world.require(connection.disturbed, f"shard {self.shard.number} does not answer {self.name}")
            self._world.counts["given up"] += 1
            then(None)

    def tell(self, message: Message) -> None:
        """This, behind all that has changed up to now."""
        self.outbox.post([message])
        self.pump()

    def pump(self) -> None:
        """There is something to be told, soon."""
        if not self._pumping and self.connection is not None:
            self._pumping = True
            self._world.later(PUBLISH_SECONDS, self._pump)

    def _pump(self) -> None:
        self._pumping = False
        for _ in range(TAKEN_AT_ONCE):
            message = None if self.connection is None else self.outbox.next(self._owner.epoch, self._owner.room())
            if message is None:
                return
            self._send(message)
        self._pumping = True
        self._world.later(TAKING_SECONDS, self._pump)

    def _beat(self, connection: Connection) -> None:
        if self.connection is connection:
            self._send(self.outbox.beat())
            self._world.later(HEARTBEAT_SECONDS, lambda: self._beat(connection))

    def _send(self, message: Message) -> None:
        copies = 1
        if isinstance(message, Publish) and self.lossy and self._world.chance(self.lossy):
            copies = self._world.random.choice((0, 2))
        if self.connection is not None:
            for _ in range(copies):
                self._network.send(self.connection, SHARD, self._encoder.encode(message))

    # --- what is heard ------------------------------------------------------------------------------------------------

    def received(self, connection: Connection, frame: bytes) -> None:
        if connection is not self.connection:
            return
        message = self._decoder.decode(frame)
        match message:
            case Welcome(nodes=nodes, purges=purges):
                for missed in purges:
                    self._owner.told(self, missed)
                self.peers = {node.node: node for node in nodes}
                self.welcomed = True
            case NodeJoined(node=node):
                self.peers[node.node] = node
            case NodeLost(node=name):
                self.peers.pop(name, None)
            case Resync(parts=parts):
                self._world.counts["resyncs"] += 1
                self.outbox.resync(parts)
                self.pump()
            case Found() | Plan() | Left() | PurgeDone():
                then = self._pending.pop(message.ask, None)  # None: it was given up
                if then is not None:
                    then(message)
            case _:
                self._owner.told(self, message)
