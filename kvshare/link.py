"""A connection to one shard of the directory: joins, publishes as it is asked to, asks, and heals itself.

    connect ─> Join ─> Welcome (who is here) ─> Resync: our turn ─> the inventory, then what changes ─> ...
       ^                                                                                                │
       └── a random pause <── anything breaks: what was told is forgotten, questions fail <─────────────┘

What is to be told is kept by an `Outbox`; one task takes it from there as fast as the connection takes it. Changes are
collected for ``publish_seconds``. Questions go at once, past what waits to be told, unless they are to come behind it.

A shard that is silent costs one question's patience, not each one's: it is then left alone for `SILENT_SECONDS`, or until it
speaks.

Threads: everything runs on the node's loop; only ``resolve`` (where is the shard?) is called in a thread of the loop's pool.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from kvshare import wire
from kvshare.cluster_messages import (
    PURPOSE,
    Declared,
    Erase,
    Find,
    Found,
    FromDirectory,
    Host,
    Hosted,
    Join,
    Left,
    NodeJoined,
    NodeLost,
    Plan,
    PurgeDone,
    Resync,
    Take,
    Welcome,
)
from kvshare.config import Settings
from kvshare.errors import KVShareError, ProtocolError, Unavailable
from kvshare.fingerprints import index_seed
from kvshare.index import CompactIndex
from kvshare.messages import PROTOCOL_VERSION, Message
from kvshare.outbox import Outbox
from kvshare.places import GroupPlan, NodeDescription, Stored
from kvshare.runs import NOWHERE, Keys, Places, Seen

log = logging.getLogger("kvshare")

CONNECT_SECONDS = 5.0
PAUSE_SECONDS = (0.2, 2.0)  # between attempts, at most: at first, later. How much of it is random: nodes come back one by one
PAUSE_SHARE_MIN = 0.1
SILENT_SECONDS = 2.0  # a shard that did not answer in time is not asked where keys are for so long

Answer = Callable[[Message], None]


@dataclass(frozen=True)
class Member:
    """What joins the directory, a node or an engine's KV cache.

    inventory: all that it holds. on_joined, on_lost: others come, change and go. room: bytes free for more. host: begins to
    give blocks to a group, or returns None; without it this member is no donor of groups. on_take begins to take blocks of a
    node that leaves, on_erase a purge; what they answer by the second argument is told behind all that has changed.
    """

    name: str
    describe: Callable[[], NodeDescription]
    inventory: Callable[[], Iterator[Stored]]
    on_joined: Callable[[NodeDescription], None] = lambda _: None
    on_lost: Callable[[str], None] = lambda _: None
    room: Callable[[], int] = lambda: 0
    host: Callable[[Host], GroupPlan | None] | None = None
    on_take: Callable[[Take, Answer], None] = lambda *_: None
    on_erase: Callable[[Erase, Answer], None] = lambda *_: None


class DirectoryLink:
    """See the module's docstring. ``listed``: called with names of nodes that came, changed or went (see `nodes`), or with None
    when any may have."""

    def __init__(
        self,
        settings: Settings,
        member: Member,
        resolve: Callable[[], str],
        listed: Callable[[Iterable[str] | None], None],
        shard: int = 0,
        shards: int = 1,
    ) -> None:
        self._settings = settings
        self._member = member
        self._resolve = resolve
        self._listed = listed
        self._shard, self._shards = shard, shards
        self._name = "directory" if shards == 1 else f"directory shard {shard}"
        seed = index_seed(settings.secret)
        self._outbox = Outbox(
            member.name,
            lambda: CompactIndex(settings.index_keys_max, seed),
            seed,
            member.inventory,
            shard,
            shards,
        )
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(FromDirectory)
        self._writer: asyncio.StreamWriter | None = None
        self._pending: dict[int, asyncio.Future[Any]] = {}
        self._asks = itertools.count(1)
        self._due = asyncio.Event()  # something is to be told now
        self._timer: asyncio.TimerHandle | None = None
        self._ready = asyncio.Event()
        self._silent_until = 0.0
        self.nodes: dict[str, NodeDescription] = {}  # as the shard lists them, or did when it was last here
        self.welcomed = False
        self.endpoint = ""  # of the shard, while connected
        self._counters = {"finds": 0, "joins": 0, "silent": 0}

    @property
    def counters(self) -> dict[str, int]:
        return self._counters | self._outbox.counters

    @property
    def connected(self) -> bool:
        return self._writer is not None

    @property
    def ready(self) -> bool:
        """The shard knows us and what we hold: before that it can't answer for the cluster."""
        return self._ready.is_set()

    async def run(self) -> None:
        """Until cancelled: connect, serve, and again."""
        pause, longest = PAUSE_SECONDS
        said = False
        while True:
            try:
                endpoint = await asyncio.to_thread(self._resolve)
                if not endpoint:
                    raise Unavailable("none yet")
                reader, writer = await wire.connect_async(endpoint, self._settings.secret, PURPOSE, CONNECT_SECONDS)
            except Exception as error:  # includes whatever a resolver raises: the shard is away, we go on without
                if not said:
                    line = "kvshare: no %s (%s); blocks of this host are shared again when it is back"
                    log.warning(line, self._name, error)
                    said = True
            else:
                pause, said = PAUSE_SECONDS[0], False
                await self._serve(endpoint, reader, writer)
            await asyncio.sleep(pause * random.uniform(PAUSE_SHARE_MIN, 1.0))
            pause = min(pause * 2, longest)

    # --- telling ------------------------------------------------------------------------------------------------------

    def changed(self, stored: Iterable[Stored], removed: Iterable[bytes]) -> None:
        """These blocks came, those went; told within ``publish_seconds``."""
        self._outbox.changed(stored, removed)
        self._arm()

    def looked(self, seen: Seen) -> None:
        """An engine looked this up."""
        self._outbox.looked(seen)
        self._arm()

    def answer(self, message: Message) -> None:
        """Tell the shard this, and before it all that has changed."""
        self._outbox.post([message])
        self._due.set()

    def described(self) -> None:
        """Our description changed (a new region)."""
        capable = self._member.host is not None and self._shards == 1
        self._send(Join(PROTOCOL_VERSION, self._member.describe(), capable, self._shard, self._shards))

    # --- asking -------------------------------------------------------------------------------------------------------

    async def until_ready(self) -> None:
        await self._ready.wait()

    async def ask(self, make: Callable[[int], Message], seconds: float) -> Any:
        """A question to the shard. Raises Unavailable."""
        return await self._asked(lambda number: self._send(make(number)), seconds)

    async def ask_behind(self, make: Callable[[int], Iterable[Message]], seconds: float) -> Any:
        """A question of one or more messages that comes behind all that has changed. Raises Unavailable."""

        def post(number: int) -> None:
            self._outbox.post(make(number))
            self._due.set()

        return await self._asked(post, seconds)

    async def find(self, keys: Sequence[Keys], seconds: float) -> Places:
        """Where these keys are; of the last ones it may say nothing. If the shard is away or silent: nowhere, at once."""
        if self._writer is None or not self._may_be_asked():
            return NOWHERE
        self._counters["finds"] += 1
        try:
            answer = await self.ask(lambda ask: Find(ask, list(keys)), seconds)
        except Unavailable as error:
            log.debug("kvshare: %s", error)
            self._counters["silent"] += 1
            self._silent_until = time.monotonic() + SILENT_SECONDS
            return NOWHERE
        assert isinstance(answer, Found)
        return answer.places

    def _may_be_asked(self) -> bool:
        """A shard that was silent is tried again by one question at a time."""
        if not self._silent_until:
            return True
        now = time.monotonic()
        if now < self._silent_until:
            return False
        self._silent_until = now + SILENT_SECONDS
        return True

    async def _asked(self, put: Callable[[int], None], seconds: float) -> Any:
        if self._writer is None:
            raise Unavailable(f"no {self._name}")
        number = next(self._asks)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._pending[number] = future
        try:
            put(number)
            async with asyncio.timeout(seconds):
                return await future
        except TimeoutError as error:
            raise Unavailable(f"the {self._name} did not answer in time") from error
        finally:
            self._pending.pop(number, None)

    # --- the connection -----------------------------------------------------------------------------------------------

    async def _serve(self, endpoint: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer, self.endpoint = writer, endpoint
        helpers = [asyncio.create_task(self._beat()), asyncio.create_task(self._tell(writer))]
        try:
            self.described()
            self._arm()
            while True:
                self._handle(self._decoder.decode(await wire.read_frame(reader, self._settings.message_bytes_max)))
        except (KVShareError, OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            log.warning("kvshare: lost the %s at %s: %s", self._name, endpoint, error)
        except Exception:
            log.exception("kvshare: lost the %s at %s by a failure of ours", self._name, endpoint)
        finally:
            for helper in helpers:
                helper.cancel()
            self._forget()
            writer.close()

    def _handle(self, message: Any) -> None:
        self._silent_until = 0.0
        match message:
            case Welcome(nodes=nodes, purges=purges):
                self._counters["joins"] += 1
                for erase in purges:
                    self._member.on_erase(erase, self.answer)  # before we publish: what it bars is not told
                self.nodes, self.welcomed = {node.node: node for node in nodes}, True
                self._listed(None)
            case NodeJoined(node=node):
                self.nodes[node.node] = node
                self._listed([node.node])
            case NodeLost(node=name):
                self.nodes.pop(name, None)
                self._listed([name])
            case Erase():
                self._member.on_erase(message, self.answer)
            case Resync(parts=parts):
                self._outbox.resync(parts)
                self._due.set()
            case Host():
                self._send(Hosted(message.ask, None if self._member.host is None else self._member.host(message)))
            case Take():
                self._member.on_take(message, self.answer)
            case Found() | Declared() | Plan() | PurgeDone() | Left():
                future = self._pending.get(message.ask)
                if future is not None and not future.done():
                    future.set_result(message)
            case _:
                raise ProtocolError(f"the directory sent {type(message).__name__}, which is no message to a node")

    def _arm(self) -> None:
        if self._timer is None and self._writer is not None:
            self._timer = asyncio.get_running_loop().call_later(self._settings.publish_seconds, self._due_now)

    def _due_now(self) -> None:
        self._timer = None
        self._due.set()

    async def _tell(self, writer: asyncio.StreamWriter) -> None:
        """Empty the outbox whenever that is due. Whoever reads from the connection hears when it breaks."""
        try:
            while True:
                await self._due.wait()
                self._due.clear()
                await self._empty(writer)
                if self._outbox.given:
                    self._ready.set()
        except OSError:
            pass
        except Exception:
            log.exception("kvshare: joining the %s again after a failure of ours", self._name)
            writer.transport.abort()

    async def _empty(self, writer: asyncio.StreamWriter) -> None:
        """No faster than the shard reads, and with turns for others in between. Raises OSError."""
        while not writer.is_closing():
            message = self._outbox.next(self._member.describe().epoch, self._member.room() // self._shards)
            if message is None:
                return
            self._send(message)
            await writer.drain()
            await asyncio.sleep(0)

    def _send(self, message: Message) -> None:
        if self._writer is None or self._writer.is_closing():
            return
        wire.write_frame(self._writer, self._encoder.encode(message))
        if self._writer.transport.get_write_buffer_size() > self._settings.message_bytes_max:
            log.warning("kvshare: the %s does not read what we send: joining it again", self._name)
            self._writer.transport.abort()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._settings.heartbeat_seconds)
            self._send(self._outbox.beat())

    def _forget(self) -> None:
        self._writer, self.endpoint, self.welcomed = None, "", False
        self._ready.clear()
        self._due.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._outbox.forget()
        for future in self._pending.values():
            if not future.done():
                future.set_exception(Unavailable(f"the {self._name} is gone"))
        self._silent_until = 0.0
        self._listed(list(self.nodes))
