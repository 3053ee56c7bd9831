"""The node's side of one session: decode, answer, push. All on the node's loop."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec.structs import replace

from kvshare import keys, wire
from kvshare.errors import ProtocolError, RegionError, Unavailable
from kvshare.locating import DIRECTORY_SECONDS, Locating
from kvshare.messages import (
    PROTOCOL_VERSION,
    Abort,
    AskStatus,
    AskWarm,
    Attach,
    Attached,
    Commit,
    Done,
    Drain,
    Dropped,
    Expose,
    Indexed,
    Locate,
    Looked,
    Message,
    Missed,
    Purge,
    Quarantine,
    Refused,
    Reserve,
    Reserved,
    Shown,
    Stop,
    ToNode,
)
from kvshare.places import Stored

if TYPE_CHECKING:
    from kvshare.node import Node

log = logging.getLogger("kvshare")

OUTBOX_BYTES_MAX = 64 << 20  # a session that does not read is dropped; it attaches anew and gets the whole index
PUSH_BLOCKS_MAX = 4096
WAIT_SECONDS_MAX = 3600.0


class NodeSession:
    """One connection of an engine's process, a custom stack or a command-line tool."""

    def __init__(self, node: Node, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.number = number
        self.engine = ""
        self._node = node
        self._reader = reader
        self._writer = writer
        self._family = b""
        self._subscribed = False
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(ToNode)
        self._tasks: set[asyncio.Task[None]] = set()
        self._locating = Locating(node, self)

    async def serve(self) -> None:
        """Until the other side closes. Raises ProtocolError for what is no message of ours."""
        bytes_max = self._node.settings.message_bytes_max
        try:
            while True:
                frame = await wire.read_frame(self._reader, bytes_max)
                try:
                    message = self._decoder.decode(frame)
                except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                    raise ProtocolError(f"a session sent no message of ours: {error}") from error
                await self._handle(message)
        finally:
            for task in self._tasks:
                task.cancel()

    def push(self, stored: list[Stored], removed: list[bytes]) -> None:
        """Tell a subscriber what changed in its family. Removals first: their slots may be among the stored."""
        if not self._subscribed:
            return
        gone = [key for key in removed if keys.family_of(key) == self._family]
        if gone:
            self.send(Dropped(gone))
        came = [block for block in stored if keys.family_of(block.key) == self._family]
        for start in range(0, len(came), PUSH_BLOCKS_MAX):
            self.send(Indexed(came[start : start + PUSH_BLOCKS_MAX]))

    def send(self, message: Message) -> None:
        if self._writer.is_closing():
            return
        wire.write_frame(self._writer, self._encoder.encode(message))
        if self._writer.transport.get_write_buffer_size() > OUTBOX_BYTES_MAX:
            log.warning("kvshare: engine %s does not read; dropping its session", self.engine)
            self._writer.transport.abort()

    def close(self) -> None:
        self._writer.close()

    async def _handle(self, message: Any) -> None:
        memory = self._node.memory
        match message:
            case Locate():
                self._locating.locate(message)
            case Reserve(ask=ask, region=region, keys=wanted, length=length):
                store = memory.stores.get(region)
                if store is None or length > region:
                    self.send(Refused(ask, f"this node has no region {region} for blocks of {length} bytes: attach again"))
                    return
                if self._node.handover.closed:
                    self.send(Reserved(ask, [-1] * len(wanted), [0] * len(wanted)))
                    return
                if store.free_slots < len(wanted):
                    await memory.grown(region)  # rather than evict what may be the head of the same chain
                pairs = store.reserve(wanted, length, self.number, time.monotonic(), memory.ends.of(wanted))
                # Before the answer: its slots may have been others' a moment ago.
                memory.flush(region)
                self.send(Reserved(ask, [slot for slot, _ in pairs], [generation for _, generation in pairs]))
            case Commit(ask=ask, region=region, slots=slots, generations=generations, checksums=checksums):
                store = memory.stores.get(region)
                stored = store.commit(slots, generations, checksums, self.number) if store is not None else []
                if stored:
                    memory.flush(region, stored)
                self.send(Done(ask, len(stored)))
            case Abort(region=region, slots=slots, generations=generations):
                if region in memory.stores:
                    memory.stores[region].abort(slots, generations, self.number)
            case Quarantine():
                self._quarantine(message)
            case Missed(keys=wrong):
                self._node.answers.drop(wrong)
            case Looked(keys=chain, hits=hits):
                self._looked(chain, hits)
            case Attach():
                await self._attach(message)
            case Expose():
                await self._node.expose(self, message)
            case Shown():
                if self.number in self._node.exposed:
                    self._node.exposed[self.number].show(message)
            case AskWarm(ask=ask, family=family, wait_seconds=seconds):
                self.later(self._warm(ask, family, min(seconds, WAIT_SECONDS_MAX)))
            case AskStatus(ask=ask):
                self.send(self._node.status_for(ask))
            case Purge():
                self.later(self._purge(message))
            case Drain(ask=ask, seconds=seconds, keep_arena=keep_arena):
                limit = min(seconds, WAIT_SECONDS_MAX)
                self._node.handover.leave_soon(limit, keep_arena, lambda drained: self.send(replace(drained, ask=ask)))
            case Stop(ask=ask):
                self.send(Done(ask, 1))
                self._node.stop_soon()

    async def _attach(self, message: Attach) -> None:
        if message.version != PROTOCOL_VERSION:
            reason = f"this node speaks protocol {PROTOCOL_VERSION}, the engine {message.version}: run one version of kvshare"
            self.send(Refused(message.ask, reason))
            return
        if message.block_bytes <= 0:
            self.send(Refused(message.ask, f"blocks of {message.block_bytes} bytes cannot be stored"))
            return
        node, memory = self._node, self._node.memory
        try:
            arena, store = await memory.region_for(message.block_bytes)
        except (RegionError, OSError) as error:
            self.send(Refused(message.ask, str(error)))
            return
        self.engine, self._family = message.engine, message.namespace.family()
        notices = await self._declare(message.namespace)
        description = memory.region(arena.region, node.name, node.transports.endpoint())
        self.send(Attached(message.ask, node.describe(), description, notices))
        self._subscribed = message.subscribe
        self.push([block for block in store.inventory()], [])
        if message.warm:
            node.warmer.start(self._family, message.tenant)

    async def _declare(self, namespace: keys.Namespace) -> list[str]:
        """Remember the namespace; one line for each other that comes near but does not share."""
        known = self._node.namespaces
        others = {other.family(): other for other in known.values()}
        known[namespace.family()] = namespace
        try:
            known_elsewhere = await self._node.link.declare(namespace, DIRECTORY_SECONDS)
            others.update({other.family(): other for other in known_elsewhere})
        except Unavailable:
            pass  # this host's own namespaces are compared all the same
        if namespace.family() in others:
            return []
        return [_differs(namespace, other) for other in list(others.values())[:3]]

    def _quarantine(self, message: Quarantine) -> None:
        store = self._node.memory.stores.get(message.region)
        if store is not None:
            store.quarantine(message.slots, message.generations, time.monotonic())
            self._node.memory.flush(message.region)

    def _looked(self, chain: list[bytes], hits: int) -> None:
        for store in self._node.memory.stores.values():
            store.touch(chain[:hits], chain[hits:])
        self._node.memory.tiers.used(chain[:hits])
        if self._node.clustered:
            self._node.link.looked(chain)

    async def _warm(self, ask: int, family: bytes, seconds: float) -> None:
        self.send(await self._node.warmer.wait(ask, family, seconds))

    async def _purge(self, message: Purge) -> None:
        self.send(await self._node.purger.ask(message))

    def later(self, work: Any) -> None:
        """Do this as long as the session lives."""
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _differs(ours: keys.Namespace, other: keys.Namespace) -> str:
    fields = ", ".join(f"{name}: {here!r} here, {there!r} there" for name, (here, there) in ours.differing(other).items())
    return (
        f"kvshare: no sharing between {ours.label or 'this engine'} ({ours.family().hex()[:8]}) and "
        f"{other.label or 'another'} ({other.family().hex()[:8]}): {fields}"
    )
