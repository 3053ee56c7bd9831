"""A node's connection to the directory: joins, publishes in batches, asks, and heals itself.

What changed is collected for ``publish_seconds`` and sent with a sequence number. After any break the node joins again and
publishes everything, so nothing needs to be remembered while the directory is away: `changed` is then a no-op.

Threads: everything runs on the node's loop; only ``resolve`` (who is the directory?) is called in a thread of the loop's pool.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec

from kvshare import wire
from kvshare.cluster_messages import (
    Beat,
    Declared,
    Erase,
    Found,
    FromDirectory,
    Host,
    Hosted,
    Join,
    Left,
    NodeJoined,
    NodeLost,
    Plan,
    Publish,
    PurgeDone,
    Report,
    Resync,
    Take,
    Welcome,
)
from kvshare.config import Settings
from kvshare.errors import KVShareError, ProtocolError, Unavailable
from kvshare.messages import PROTOCOL_VERSION, Message
from kvshare.places import GroupPlan, NodeDescription, Stored

log = logging.getLogger("kvshare")

PURPOSE = "directory"
CONNECT_SECONDS = 5.0
PAUSE_SECONDS = (0.1, 2.0)  # between attempts: first, longest
PUBLISH_BLOCKS_MAX = 4096  # per message
REPORT_KEYS_MAX = 65_536  # of hot chains waiting to be reported; beyond it the sample is good enough


class DirectoryLink:
    """See the module's docstring. ``inventory`` yields all that the node holds, for a full publish. ``host`` begins to give
    blocks to a group, or returns None; without it this node is no donor of groups. ``room``: bytes free for more; ``on_take``
    begins to take blocks of a node that leaves, ``on_erase`` a purge; they answer by `answer`."""

    def __init__(
        self,
        settings: Settings,
        resolve: Callable[[], str],
        describe: Callable[[], NodeDescription],
        inventory: Callable[[], Iterator[Stored]],
        on_joined: Callable[[NodeDescription], None],
        on_lost: Callable[[str], None],
        host: Callable[[Host], GroupPlan | None] | None = None,
        room: Callable[[], int] = lambda: 0,
        on_take: Callable[[Take], None] = lambda _: None,
        on_erase: Callable[[Erase], None] = lambda _: None,
    ) -> None:
        self._settings = settings
        self._resolve = resolve
        self._describe = describe
        self._inventory = inventory
        self._on_joined = on_joined
        self._on_lost = on_lost
        self._host = host
        self._room = room
        self._on_take = on_take
        self._on_erase = on_erase
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(FromDirectory)
        self._writer: asyncio.StreamWriter | None = None
        self._pending: dict[int, asyncio.Future[Any]] = {}
        self._asks = itertools.count(1)
        self._sequence = 0
        self._stored: dict[bytes, Stored] = {}
        self._removed: dict[bytes, None] = {}
        self._chains: list[list[bytes]] = []
        self._chain_keys = 0
        self._flush_timer: asyncio.TimerHandle | None = None
        self._nodes: set[str] = set()
        self._welcomed = asyncio.Event()
        self.endpoint = ""  # of the directory, while connected
        self.counters = {"publishes": 0, "resyncs": 0, "finds": 0, "joins": 0}

    @property
    def connected(self) -> bool:
        return self._writer is not None

    async def run(self) -> None:
        """Until cancelled: connect, serve, and again."""
        pause, longest = PAUSE_SECONDS
        said = False
        while True:
            try:
                endpoint = await asyncio.to_thread(self._resolve)
                if not endpoint:
                    raise Unavailable("no directory yet")
                reader, writer = await wire.connect_async(endpoint, self._settings.secret, PURPOSE, CONNECT_SECONDS)
            except Exception as error:  # includes whatever a resolver raises: the directory is away, we go on without
                if not said:
                    log.warning("kvshare: no directory (%s); blocks of this host are shared again when it is back", error)
                    said = True
            else:
                pause, said = PAUSE_SECONDS[0], False
                await self._serve(endpoint, reader, writer)
            await asyncio.sleep(pause)
            pause = min(pause * 2, longest)

    def changed(self, stored: Iterable[Stored], removed: Iterable[bytes]) -> None:
        """These blocks came, those went; told to the directory within ``publish_seconds``."""
        if self._writer is None:
            return
        for key in removed:
            self._stored.pop(key, None)
            self._removed[key] = None
        for block in stored:
            self._removed.pop(block.key, None)
            self._stored[block.key] = block
        self._arm()

    def looked(self, chain: list[bytes]) -> None:
        """An engine looked up this chain."""
        if self._writer is not None and self._chain_keys < REPORT_KEYS_MAX:
            self._chains.append(chain)
            self._chain_keys += len(chain)
            self._arm()

    def answer(self, message: Message) -> None:
        """Tell the directory this, and before it all that has changed."""
        self.flush()
        self._send(message)

    def flush(self) -> None:
        """Tell the directory now what has changed."""
        if self._flush_timer is not None:
            self._flush_timer.cancel()
            self._flush()

    def described(self) -> None:
        """Our description changed (a new region)."""
        if self._writer is not None:
            self._join()

    async def ready(self) -> None:
        """Returns when the directory has welcomed us: before that it can't answer for the cluster."""
        await self._welcomed.wait()

    async def ask(self, make: Callable[[int], Message], seconds: float) -> Any:
        """A question to the directory. Raises Unavailable."""
        if self._writer is None:
            raise Unavailable("no directory")
        number = next(self._asks)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._pending[number] = future
        try:
            self._send(make(number))
            async with asyncio.timeout(seconds):
                return await future
        except TimeoutError as error:
            raise Unavailable("the directory did not answer in time") from error
        finally:
            self._pending.pop(number, None)

    async def _serve(self, endpoint: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer, self.endpoint = writer, endpoint
        beating = asyncio.create_task(self._beat())
        try:
            self._join()
            while True:
                self._handle(self._decoder.decode(await wire.read_frame(reader, self._settings.message_bytes_max)))
        except (KVShareError, OSError, msgspec.DecodeError) as error:
            log.warning("kvshare: lost the directory at %s: %s", endpoint, error)
        finally:
            beating.cancel()
            self._forget()
            writer.close()

    def _handle(self, message: Any) -> None:
        match message:
            case Welcome(nodes=nodes, purges=purges):
                self.counters["joins"] += 1
                for erase in purges:
                    self._on_erase(erase)  # before we publish: what it bars is not told
                for gone in self._nodes - {node.node for node in nodes}:
                    self._on_lost(gone)
                self._nodes = {node.node for node in nodes}
                for node in nodes:
                    self._on_joined(node)
                self._publish_all()
                self._welcomed.set()
            case NodeJoined(node=node):
                self._nodes.add(node.node)
                self._on_joined(node)
            case NodeLost(node=name):
                self._nodes.discard(name)
                self._on_lost(name)
            case Erase():
                self._on_erase(message)
            case Resync():
                self.counters["resyncs"] += 1
                self._publish_all()
            case Host():
                self._send(Hosted(message.ask, None if self._host is None else self._host(message)))
            case Take():
                self._on_take(message)
            case Found() | Declared() | Plan() | PurgeDone() | Left():
                future = self._pending.get(message.ask)
                if future is not None and not future.done():
                    future.set_result(message)
            case _:
                raise ProtocolError(f"the directory sent {type(message).__name__}, which is no message to a node")

    def _join(self) -> None:
        self._send(Join(PROTOCOL_VERSION, self._describe(), self._host is not None))

    def _publish_all(self) -> None:
        self._stored.clear()
        self._removed.clear()
        first = True
        blocks = self._inventory()
        while (batch := list(itertools.islice(blocks, PUBLISH_BLOCKS_MAX))) or first:
            self._publish(first, batch, [])
            first = False

    def _publish(self, full: bool, stored: list[Stored], removed: list[bytes]) -> None:
        self._sequence += 1
        self.counters["publishes"] += 1
        description = self._describe()
        self._send(Publish(description.node, description.epoch, self._sequence, full, stored, removed, self._room()))

    def _arm(self) -> None:
        if self._flush_timer is None:
            self._flush_timer = asyncio.get_running_loop().call_later(self._settings.publish_seconds, self._flush)

    def _flush(self) -> None:
        self._flush_timer = None
        stored, removed = list(self._stored.values()), list(self._removed)
        self._stored.clear()
        self._removed.clear()
        for start in range(0, max(len(stored), len(removed)), PUBLISH_BLOCKS_MAX):
            end = start + PUBLISH_BLOCKS_MAX
            self._publish(False, stored[start:end], removed[start:end])
        if self._chains:
            self._send(Report(self._chains))
            self._chains, self._chain_keys = [], 0

    def _send(self, message: Message) -> None:
        if self._writer is not None:
            wire.write_frame(self._writer, self._encoder.encode(message))

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._settings.heartbeat_seconds)
            self._send(Beat())

    def _forget(self) -> None:
        self._writer, self.endpoint = None, ""
        self._welcomed.clear()
        if self._flush_timer is not None:
            self._flush_timer.cancel()
            self._flush_timer = None
        self._stored.clear()
        self._removed.clear()
        self._chains, self._chain_keys = [], 0
        for future in self._pending.values():
            if not future.done():
                future.set_exception(Unavailable("the directory is gone"))
