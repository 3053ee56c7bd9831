"""The network of a simulated cluster: connections between nodes and the shards of the directory, and what befalls them.

    node end ──frames──> shard end        in order, each after a random delay, as TCP does
             <──frames──

* `end`: one side closes; what it sent before arrives, then the other side hears of it.
* `sever`: what is under way is lost, and each side hears of the break, or does not: a half-open connection.
* A frame that comes to a closed end is answered by a reset, unless that end's host is gone.
* A partition of a node and a shard holds all frames back. When it heals, they arrive late, in order; to a side that has
  given up meanwhile: a reset.

What is between nodes (reads of blocks) has no connections here: `apart` says which pairs cannot reach each other.

Threads: none.
"""

from __future__ import annotations

import itertools
from collections import deque
from functools import partial
from typing import Protocol

from tests.sim.world import World

CONNECT_SECONDS = 5.0  # until a node gives up an attempt that nobody answers
DELAYS = (0.0001, 0.006)
NODE, SHARD = 0, 1  # the two ends


class Dialling(Protocol):
    """A node's end."""

    name: str

    def connected(self, connection: Connection) -> None: ...
    def refused(self, shard: int) -> None: ...
    def received(self, connection: Connection, frame: bytes) -> None: ...
    def lost(self, connection: Connection) -> None: ...


class Listening(Protocol):
    """A shard's end."""

    number: int
    alive: bool

    def accepted(self, connection: Connection) -> None: ...
    def received(self, connection: Connection, frame: bytes) -> None: ...
    def lost(self, connection: Connection) -> None: ...


class Connection:
    """Two ends, each open until its owner has closed it or has heard of a break. ``reachable``: does the host of that end still
    answer?"""

    def __init__(self, number: int, node: Dialling, shard: Listening) -> None:
        self.number = number
        self.node, self.shard = node, shard
        self.ends: tuple[Dialling, Listening] = (node, shard)
        self.open = [True, True]
        self.reachable = [True, True]
        self.severed = False
        self.disturbed = False  # has anything befallen it that explains why an answer does not come?
        self.arrivals = [0.0, 0.0]  # of the last frame to each end
        self.queues: tuple[deque[bytes | None], deque[bytes | None]] = (deque(), deque())  # to each end; None: the last word
        self.late = [0, 0]  # of those, how many wait for a partition to heal

    @property
    def pair(self) -> tuple[str, int]:
        return self.node.name, self.shard.number


class Network:
    """See the module's docstring."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._numbers = itertools.count(1)
        self._connections: dict[int, Connection] = {}  # those with an open end
        self._partitions: dict[tuple[str, int], int] = {}  # how many of them lie between a node and a shard
        self.apart: set[tuple[str, str]] = set()

    # --- connections --------------------------------------------------------------------------------------------------

    def dial(self, node: Dialling, shard: Listening) -> None:
        """Ends with `connected` or `refused` of the node."""
        if (node.name, shard.number) in self._partitions:
            self._world.later(CONNECT_SECONDS, lambda: node.refused(shard.number))
        else:
            self._world.soon(*DELAYS, lambda: self._arrive(node, shard))

    def _arrive(self, node: Dialling, shard: Listening) -> None:
        if not shard.alive:
            node.refused(shard.number)
            return
        connection = Connection(next(self._numbers), node, shard)
        self._connections[connection.number] = connection
        shard.accepted(connection)
        node.connected(connection)

    def send(self, connection: Connection, to: int, frame: bytes) -> None:
        """From the other end. Nothing comes of it where that is closed already."""
        if connection.open[1 - to] and not connection.severed:
            self._enqueue(connection, to, frame)

    def end(self, connection: Connection, side: int) -> None:
        """``side`` closes in good order, or its process died and the kernel does."""
        if connection.open[side]:
            self._enqueue(connection, 1 - side, None)
            self._shut(connection, side)

    def _enqueue(self, connection: Connection, to: int, frame: bytes | None) -> None:
        world = self._world
        connection.queues[to].append(frame)
        arrival = max(connection.arrivals[to], world.now + world.random.uniform(*DELAYS))
        connection.arrivals[to] = arrival
        world.later(arrival - world.now, lambda: self._deliver(connection, to))

    def _deliver(self, connection: Connection, to: int) -> None:
        """The next frame arrives, or what has waited for a partition to heal."""
        if connection.severed:
            return
        if connection.pair in self._partitions:
            connection.late[to] += 1
            return
        frame = connection.queues[to].popleft()
        if frame is None:
            self._hear(connection, to)
        elif connection.open[to]:
            connection.ends[to].received(connection, frame)
        elif connection.reachable[to]:
            self._hear(connection, 1 - to)  # a reset

    def vanish(self, connection: Connection, side: int) -> None:
        """``side`` is gone with its host: nobody is told."""
        connection.reachable[side] = False
        self._shut(connection, side)

    def sever(self, connection: Connection, node_hears: float | None, shard_hears: float | None) -> None:
        """What is under way is lost. Each end hears after so many seconds, or never (None)."""
        connection.severed = connection.disturbed = True
        for side, seconds in ((NODE, node_hears), (SHARD, shard_hears)):
            if seconds is not None:
                self._world.later(seconds, partial(self._hear, connection, side))

    def _hear(self, connection: Connection, side: int) -> None:
        """``side`` hears that the connection is over; not through a partition."""
        if connection.open[side] and (connection.severed or connection.pair not in self._partitions):
            self._shut(connection, side)
            connection.ends[side].lost(connection)

    def _shut(self, connection: Connection, side: int) -> None:
        connection.open[side] = False
        connection.disturbed = True
        if not any(connection.open):
            self._connections.pop(connection.number, None)

    # --- partitions ---------------------------------------------------------------------------------------------------

    def part(self, pairs: list[tuple[str, int]], seconds: float) -> None:
        """Nothing passes between these nodes and shards for so long. Partitions may overlap."""
        for pair in pairs:
            self._partitions[pair] = self._partitions.get(pair, 0) + 1
        for connection in self._connections.values():
            connection.disturbed |= connection.pair in self._partitions
        self._world.later(seconds, lambda: self._heal(pairs))

    def _heal(self, pairs: list[tuple[str, int]]) -> None:
        for pair in pairs:
            self._partitions[pair] -= 1
            if not self._partitions[pair]:
                del self._partitions[pair]
        healed = set(pairs) - self._partitions.keys()
        for connection in [each for each in self._connections.values() if each.pair in healed]:
            for side in (NODE, SHARD):
                late, connection.late[side] = connection.late[side], 0
                for _ in range(late):
                    self._deliver(connection, side)

    # --- between nodes ------------------------------------------------------------------------------------------------

    def separate(self, names: list[str], others: list[str], seconds: float) -> None:
        """Nodes cannot read from each other for so long."""
        pairs = {(one, other) for one in names for other in others}
        pairs |= {(other, one) for one, other in pairs}
        self.apart |= pairs
        self._world.later(seconds, lambda: self.apart.difference_update(pairs))
