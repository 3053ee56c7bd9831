"""A shard of the directory in a simulated cluster: what `kvshare.directory_server` is around the real `Directory`.

    frames ── decoded ──> Directory ── commands ──> frames            alarms ── Tick ──> Directory

It dies and comes back empty, its clock jumps, and each of its answers is looked at as it goes out.

Threads: none.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import msgspec

from kvshare.cluster_messages import AskPlan, Find, Found, Plan, Publish, Take, ToDirectory
from kvshare.directory import Directory
from kvshare.directory_events import Broadcast, Close, Connected, Disconnected, Event, Heard, Lost, Send, Tell, Tick
from kvshare.finding import FOUND_LOCATIONS_MAX
from kvshare.fingerprints import index_seed
from kvshare.index import CompactIndex
from kvshare.messages import Message
from kvshare.runs import count_of, keys_of
from tests.sim.network import NODE, SHARD, Connection
from tests.sim.setting import PARENTS, Setting

TICKS_AT_ONCE_MAX = 10_000
LOOKED_AT_SHARE = 0.05  # of answers that are compared with who is here
CHECKED_EVERY = 2000  # events
ROUNDING_SECONDS = 1e-6  # between this clock and the world's


class Shard:
    """``number`` of ``shards``."""

    def __init__(self, setting: Setting, number: int, shards: int) -> None:
        self._world = setting.world
        self._network = setting.network
        self._settings = setting.settings
        self._rules = setting.rules
        self.number = number
        self._shards = shards
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(ToDirectory)
        self._encoder = msgspec.msgpack.Encoder()
        self.alive = False
        self.epoch = 0
        self.clock = 0.0  # how far this shard's clock is from the world's
        self.told: list[str] = []  # every line for the log
        self._alarm: float | None = None
        self._events = 0
        self.start()

    def start(self) -> None:
        """Comes (back), knowing nothing."""
        assert not self.alive
        self.alive = True
        self.epoch += 1
        self.connections: dict[int, Connection] = {}
        self._asked: dict[tuple[int, int], Message] = {}
        self._room: dict[int, int] = {}  # by connection: what its node has said last
        self.index = CompactIndex(self._settings.index_keys_max, index_seed(self._settings.secret))
        self.directory = Directory(self._settings, self.epoch, self.index, None, self.number, self._shards)

    def die(self, loud: bool) -> None:
        """Nodes hear of it when their kernels do, or when they get impatient."""
        self.alive = False
        for connection in list(self.connections.values()):
            if loud:
                self._network.end(connection, SHARD)
            else:
                self._network.vanish(connection, SHARD)
                self._network.sever(connection, self._world.random.uniform(1.0, 10.0), None)
        self.connections.clear()
        self._alarm = None

    def jump(self, seconds: float) -> None:
        """The clock says something else from now on."""
        self.clock += seconds
        if self.alive:
            self._arm()

    @property
    def now(self) -> float:
        return self._world.now + self.clock

    def node_lost(self, name: str) -> None:
        """Who supervises nodes says so."""
        if self.alive:
            self._feed(Lost(name))

    # --- the network's --------------------------------------------------------------------------------------------------

    def accepted(self, connection: Connection) -> None:
        self.connections[connection.number] = connection
        self._feed(Connected(connection.number))

    def received(self, connection: Connection, frame: bytes) -> None:
        if connection.number not in self.connections:
            return
        self._world.note(self.number, connection.number, frame)
        try:
            message = self._decoder.decode(frame)
        except (msgspec.DecodeError, UnicodeDecodeError):
            self._world.counts["undecoded"] += 1
            self._cut(connection)
            return
        if isinstance(message, Find | AskPlan):
            self._asked[connection.number, message.ask] = message
        elif isinstance(message, Publish):
            self._room[connection.number] = message.free_bytes
        self._feed(Heard(connection.number, message))

    def lost(self, connection: Connection) -> None:
        if self.connections.pop(connection.number, None) is not None:
            self._feed(Disconnected(connection.number))

    def _cut(self, connection: Connection) -> None:
        """The server ends a connection, and hears of it a moment later."""
        self._network.end(connection, SHARD)
        self._world.later(0.0, lambda: self.lost(connection))

    # --- the directory's ------------------------------------------------------------------------------------------------

    def _feed(self, event: Event) -> None:
        heard = self._rules.hears(event)
        for command in filter(self._rules.says, [] if heard is None else self.directory.handle(heard, self.now)):
            match command:
                case Send(connection=connection, message=message):
                    self._judge(connection, message)
                    self._send((connection,), message)
                case Broadcast(connections=connections, message=message):
                    self._send(connections, message)
                case Close(connection=connection, reason=reason):
                    self.told.append(reason)
                    if connection in self.connections:
                        self._cut(self.connections[connection])
                case Tell(text=text):
                    self.told.append(text)
                case _:
                    self._world.require(False, f"shard {self.number} wants {command}")
        self._events += 1
        if self._events % CHECKED_EVERY == 0:
            self.check()
        self._arm()

    def _send(self, connections: tuple[int, ...], message: Message) -> None:
        frame = self._encoder.encode(message)
        for number in connections:
            connection = self.connections.get(number)
            if connection is not None:
                self._network.send(connection, NODE, frame)

    def _arm(self) -> None:
        deadline = self.directory.next_deadline()
        if deadline is not None and (self._alarm is None or deadline - self.clock < self._alarm):
            self._alarm = max(deadline - self.clock + ROUNDING_SECONDS, self._world.now)
            self._world.later(self._alarm - self._world.now, partial(self._ring, self._alarm, self.epoch))

    def _ring(self, alarm: float, epoch: int) -> None:
        if not self.alive or (alarm, epoch) != (self._alarm, self.epoch):
            return
        self._alarm = None
        for _ in range(TICKS_AT_ONCE_MAX):
            deadline = self.directory.next_deadline()
            if deadline is None or deadline > self.now:
                break
            self._feed(Tick())
        else:
            self._world.require(
                False, f"shard {self.number} ticks for ever: its deadline stays at {deadline}, it is {self.now}"
            )
        self._arm()

    # --- judgement ------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        problems = self.directory.check()
        self._world.require(not problems, f"shard {self.number}: {problems[:3]}")

    def _judge(self, connection: int, message: Message) -> None:
        """An answer, against what was asked."""
        if isinstance(message, Take):
            size, room = sum(item.location.length for item in message.items), self._room.get(connection, 0)
            self._world.require(0 < size <= room, f"connection {connection} is to take {size} bytes, it has room for {room}")
        if not isinstance(message, Found | Plan):
            return
        asked = self._asked.pop((connection, message.ask), None)
        node = self.connections[connection].node.name if connection in self.connections else ""
        if isinstance(message, Found) and isinstance(asked, Find):
            self._judge_found(asked, message, node)
        elif isinstance(message, Plan) and isinstance(asked, AskPlan):
            self._judge_plan(asked, message, node)
        else:
            self._world.require(not node, f"shard {self.number} answers {message} to {node}, which asked {asked}")

    def _judge_found(self, asked: Find, found: Found, node: str) -> None:
        require, counts = self._world.require, found.places.counts
        require(len(counts) <= count_of(asked.keys), f"{len(counts)} answers to {count_of(asked.keys)} questions")
        require(max(counts, default=0) <= FOUND_LOCATIONS_MAX, f"{max(counts, default=0)} locations of one key are told")
        named = {place.node for place in found.places.places}
        require(node not in named, f"{node} is told of itself")
        if self._world.chance(LOOKED_AT_SHARE):
            here = {known.node for known in self.directory.status().nodes}
            require(named <= here, f"shard {self.number} sends {node} to {sorted(named - here)}, which are not here")

    def _judge_plan(self, asked: AskPlan, plan: Plan, node: str) -> None:
        require, items = self._world.require, plan.items
        planned = sum(item.location.length for item in items)
        require(planned <= asked.bytes_max, f"a plan of {planned} bytes for {node}, which wants at most {asked.bytes_max}")
        require(len({item.key for item in items}) == len(items), f"a plan for {node} has a block twice")
        here = {known.node for known in self.directory.status().nodes} - {node}
        donors = {item.location.node for item in items}
        require(donors <= here, f"a plan for {node} names {sorted(donors - here)}, which are not here")
        if self._shards == 1:
            names = [item.key for item in items]
            needed = [PARENTS[name] for name in names if name in PARENTS]
            held = self.index.holds(node, keys_of(needed)).tolist()
            usable = {name for name, holds in zip(needed, held, strict=True) if holds}
            for name in names:
                require(name not in PARENTS or PARENTS[name] in usable, f"a plan for {node} has a block that is of no use yet")
                usable.add(name)
        self._world.counts["plans"] += bool(items)
