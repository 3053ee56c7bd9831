"""A session: the connection of an engine (or a custom stack) to the node of its host.

    ask(prefix, hashes) ──> Question ──> available(start): blocks that can be loaded, or None ("ask again")
                                    ──> plan(start, count): LoadPlan for `kvshare.mover.Mover.load`

The node pushes what it holds of our family (`Indexed`, `Dropped`), so most questions are answered from memory: the answer
is checked against the mapped header table, the truth. Keys that our node lacks are asked for with one message; its answer
names peers. Nothing here waits: an answer that is late is a miss.

A lost node makes every question a miss; a thread reconnects (and restarts an autostarted node) behind the scenes.

Threads: all methods from any thread. `Channel`'s I/O thread delivers; one more thread exists only while reconnecting.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import repeat

import numpy as np
import numpy.typing as npt

from kvshare import keys
from kvshare.autostart import ensure_node
from kvshare.channel import Answer, Channel
from kvshare.config import Settings
from kvshare.errors import NamespaceError, RegionError, Unavailable
from kvshare.loading import LoadPlan, SourceRead
from kvshare.messages import (
    PROTOCOL_VERSION,
    AskWarm,
    Attach,
    Attached,
    Dropped,
    Indexed,
    Locate,
    Located,
    Location,
    Looked,
    Message,
    NodeDescription,
    PeerLost,
    Quarantine,
    Refused,
    RegionDescription,
    Warm,
)
from kvshare.slots import Region

log = logging.getLogger("kvshare")

RECONNECT_SECONDS = (0.2, 5.0)  # first pause, longest pause
LOOKED_KEYS_MAX = 4096  # of one request; hotness needs the head of a chain most


@dataclass(frozen=True)
class WarmState:
    """How far a warm plan is. Blocks wanted, present beforehand, pulled; bytes; seconds; donors: node -> blocks."""

    done: bool
    wanted: int = 0
    present: int = 0
    pulled: int = 0
    bytes_pulled: int = 0
    seconds: float = 0.0
    donors: dict[str, int] = field(default_factory=dict)


class Index:
    """The node's blocks of our family: prefix -> block hash -> slot, and each slot's expected generation."""

    def __init__(self) -> None:
        self.by_prefix: dict[bytes, dict[bytes, int]] = {}
        self.generations = np.zeros(1024, np.uint64)

    def add(self, key: bytes, slot: int, generation: int) -> None:
        if slot >= len(self.generations):
            self.generations = np.concatenate([self.generations, np.zeros(slot + 1, np.uint64)])
        self.by_prefix.setdefault(keys.prefix_of(key), {})[keys.hash_of(key)] = slot
        self.generations[slot] = generation

    def remove(self, key: bytes) -> None:
        hashes = self.by_prefix.get(keys.prefix_of(key))
        if hashes is not None:
            hashes.pop(keys.hash_of(key), None)
            if not hashes:
                del self.by_prefix[keys.prefix_of(key)]

    def lookup(self, prefix: bytes, hashes: Sequence[bytes]) -> npt.NDArray[np.int64]:
        """Slot of each hash, -1 where unknown."""
        known = self.by_prefix.get(prefix)
        if not known:
            return np.full(len(hashes), -1, np.int64)
        return np.fromiter(map(known.get, hashes, repeat(-1)), np.int64, len(hashes))


class Session:
    """See the module's docstring. Made by `Session.connect`."""

    def __init__(
        self, settings: Settings, namespace: keys.Namespace, engine: str, block_bytes: int, subscribe: bool, warm: bool
    ):
        self.settings = settings
        self.namespace = namespace
        self.block_bytes = block_bytes
        self.notices: list[str] = []
        self._family = namespace.family()
        self._attach = lambda ask: Attach(ask, PROTOCOL_VERSION, engine, namespace, block_bytes, subscribe, warm)
        self._channel: Channel | None = None
        self._region: Region | None = None
        self._retired: list[Region] = []  # mappings of former nodes: a running save may still write there
        self._node: NodeDescription | None = None
        self._description: RegionDescription | None = None
        self._index = Index()
        self._lock = threading.Lock()
        self._closing = threading.Event()

    @classmethod
    def connect(
        cls,
        settings: Settings,
        namespace: keys.Namespace,
        *,
        engine: str,
        block_bytes: int,
        subscribe: bool = True,
        warm: bool = False,
    ) -> Session:
        """Attach to the host's node, starting one if there is none and ``settings.autostart``.

        Raises:
            Unavailable: no node within ``settings.attach_seconds``. NamespaceError: the node refuses us.
        """
        session = cls(settings, namespace, engine, block_bytes, subscribe, warm)
        session._open(time.monotonic() + settings.attach_seconds)
        return session

    @property
    def connected(self) -> bool:
        return self._channel is not None and self._channel.alive

    @property
    def region(self) -> Region | None:
        """The node's region for our blocks, mapped writable, or None while disconnected."""
        return self._region if self.connected else None

    @property
    def node(self) -> NodeDescription | None:
        return self._node

    def ask(self, prefix: bytes, hashes: Sequence[bytes]) -> Question:
        """Start a question about a chain of blocks. Never blocks; sends at most one message."""
        return Question(self, prefix, hashes)

    def send(self, message: Message) -> bool:
        channel = self._channel
        return channel is not None and channel.send(message)

    def call(self, make: Callable[[int], Message], seconds: float) -> Answer:
        """Ask the node and wait. Not for an engine's scheduler. Raises Unavailable."""
        channel = self._channel
        if channel is None:
            raise Unavailable("the session has no node")
        try:
            return channel.ask(make).result(seconds)
        except TimeoutError as error:
            raise Unavailable(f"the node did not answer within {seconds} s") from error

    def warm(self, family: bytes | None = None, wait_seconds: float = 0.0) -> WarmState:
        """State of the warm plan, waiting up to ``wait_seconds`` for its end. Raises Unavailable."""
        family = self._family if family is None else family
        return warm_state(self.call(lambda ask: AskWarm(ask, family, wait_seconds), wait_seconds + 2.0))

    def quarantine(self, slots: npt.NDArray[np.int64], generations: npt.NDArray[np.uint64]) -> None:
        """These blocks of our node's region failed verification: have them taken out."""
        self.send(Quarantine(self.block_region, slots.tolist(), generations.tolist()))

    @property
    def block_region(self) -> int:
        return self._description.region if self._description is not None else 0

    def close(self) -> None:
        """Detach; idempotent. Mappings stay until the process ends if a transfer may still use them."""
        self._closing.set()
        with self._lock:
            channel = self._channel
        if channel is not None:
            channel.close()
        with self._lock:
            regions, self._retired = [*self._retired, *([self._region] if self._region else [])], []
            self._region = None
        for region in regions:
            region.close()

    # --- used by Question ---------------------------------------------------------------------------------------------

    def local(self, prefix: bytes, hashes: Sequence[bytes]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64]]:
        """Slots (-1: unknown) and generations of blocks in our node's region, checked against its header table."""
        with self._lock:
            region = self._region
            slots = self._index.lookup(prefix, hashes)
            generations = self._index.generations[slots]  # slot -1 reads the last entry: not looked at
        if region is None or not self.connected:
            return np.full(len(hashes), -1, np.int64), generations
        known = np.flatnonzero(slots >= 0)
        if len(known):
            current = region.generations(slots[known])
            slots[known[current != generations[known]]] = -1
        return slots, generations

    def locate(self, wanted: list[bytes], answer: Callable[[Located | None], None]) -> bool:
        """Ask the node where ``wanted`` are; ``answer`` is called in another thread. False when there is no node."""
        channel = self._channel
        if channel is None or not channel.alive:
            return False
        future = channel.ask(lambda ask: Locate(ask, wanted))
        future.add_done_callback(
            lambda done: answer(found if done.exception() is None and isinstance(found := done.result(), Located) else None)
        )
        return True

    @property
    def description(self) -> RegionDescription | None:
        return self._description

    # --- connection ---------------------------------------------------------------------------------------------------

    def _open(self, deadline: float) -> None:
        """Connect and attach, retrying until ``deadline``. Raises Unavailable or NamespaceError."""
        pause, started = 0.02, False
        while True:
            try:
                self._try_open(max(0.1, deadline - time.monotonic()))
                return
            except (Unavailable, RegionError) as error:
                if time.monotonic() + pause > deadline:
                    raise Unavailable(
                        f"no kvshare node at {self.settings.socket_path} within {self.settings.attach_seconds} s ({error}): "
                        "start one with 'kvshare node', or set autostart=true"
                    ) from error
            if self.settings.autostart and not started:
                started = ensure_node(self.settings)
            if self._closing.wait(pause):
                raise Unavailable("the session is closing")
            pause = min(pause * 1.5, 0.5)

    def _try_open(self, seconds: float) -> None:
        # An index of its own for each connection: what is pushed before we have seen the answer is not lost, and what a
        # former connection still delivers does no harm.
        index = Index()
        channel = Channel(
            self.settings.socket_path,
            self.settings.message_bytes_max,
            lambda message: self._pushed(index, message),
            lambda reason: self._lost(index, reason),
        )
        try:
            answer = channel.ask(self._attach).result(seconds)
            if isinstance(answer, Refused):
                raise NamespaceError(answer.reason)
            assert isinstance(answer, Attached)
            region = Region.open(answer.region.data_path, answer.region.table_path, writable=True)
        except TimeoutError as error:
            channel.close()
            raise Unavailable("the node did not answer") from error
        except BaseException:
            channel.close()
            raise
        with self._lock:
            if not channel.alive:
                region.close()
                raise Unavailable("the node closed the connection")
            if self._region is not None:
                self._retired.append(self._region)
            self._index, self._region, self._channel = index, region, channel
            self._description, self._node = answer.region, answer.node
            self.notices = list(answer.notices)
        threading.Thread(target=region.populate, name="kvshare-populate", daemon=True).start()

    def _pushed(self, index: Index, message: Indexed | Dropped | PeerLost) -> None:
        with self._lock:
            match message:
                case Indexed(stored=stored):
                    for block in stored:
                        index.add(block.key, block.slot, block.generation)
                case Dropped(keys=dropped):
                    for key in dropped:
                        index.remove(key)
                case PeerLost():
                    pass  # locations of peers are not kept beyond a question

    def _lost(self, index: Index, reason: str) -> None:
        """In the channel's thread: forget all, reconnect in the background unless we are closing."""
        with self._lock:
            current = self._index is index
            if current:
                self._index = Index()
        if current and not self._closing.is_set():
            log.warning(
                "kvshare: lost the node at %s (%s); the engine computes on without it", self.settings.socket_path, reason
            )
            threading.Thread(target=self._reconnect, name="kvshare-reconnect", daemon=True).start()

    def _reconnect(self) -> None:
        pause, longest = RECONNECT_SECONDS
        while not self._closing.wait(pause):
            try:
                self._open(time.monotonic() + self.settings.attach_seconds)
            except Unavailable:
                pause = min(pause * 2, longest)
            except NamespaceError as error:
                log.warning("kvshare: the node refuses this engine now (%s); it runs unshared", error)
                return
            else:
                log.info("kvshare: attached to the node at %s again", self.settings.socket_path)
                return


class Question:
    """What became of one chain of blocks; made by `Session.ask`.

    Threads: one asker; the answer arrives in the channel's thread and is handed over by a single assignment.
    """

    def __init__(self, session: Session, prefix: bytes, hashes: Sequence[bytes]) -> None:
        self._session = session
        self._prefix = prefix
        self._hashes = hashes
        self._remote: dict[int, Location] = {}
        self._peers: dict[tuple[str, int], RegionDescription] = {}
        self._waiting = False
        self._closed = False
        self._deadline = 0.0
        slots, _ = session.local(prefix, hashes)
        missing = np.flatnonzero(slots < 0).tolist()
        if missing:
            wanted = [prefix + hashes[i] for i in missing]
            self._deadline = time.monotonic() + session.settings.lookup_seconds
            self._waiting = True
            if not session.locate(wanted, lambda located: self._answered(missing, located)):
                self._waiting = False

    def available(self, start: int) -> int | None:
        """Leading blocks from index ``start`` that can be loaded now; None while the answer still travels."""
        hashes = self._hashes[start:] if start else self._hashes
        slots, _ = self._session.local(self._prefix, hashes)
        remote = self._remote
        count = 0
        gaps = np.flatnonzero(slots < 0)
        for gap in gaps.tolist():
            if gap + start not in remote:
                count = gap
                break
        else:
            return len(hashes)
        if self._waiting:
            if time.monotonic() < self._deadline:
                return None
            self._waiting = False
        return count

    def plan(self, start: int, count: int) -> LoadPlan:
        """Sources of ``count`` blocks from index ``start``, as `available` just said."""
        hashes = list(self._hashes[start : start + count])
        slots, generations = self._session.local(self._prefix, hashes)
        reads: list[SourceRead] = []
        description = self._session.description
        local = np.flatnonzero(slots >= 0)
        if len(local) and description is not None:
            reads.append(SourceRead(description, local, slots[local], generations[local]))
        by_region: dict[tuple[str, int], list[tuple[int, Location]]] = {}
        for position in np.flatnonzero(slots < 0).tolist():
            location = self._remote.get(position + start)
            if location is not None:
                by_region.setdefault((location.node, location.region), []).append((position, location))
        for source, blocks in by_region.items():
            reads.append(
                SourceRead(
                    self._peers[source],
                    np.array([position for position, _ in blocks], np.int64),
                    np.array([location.slot for _, location in blocks], np.int64),
                    np.array([location.generation for _, location in blocks], np.uint64),
                )
            )
        return LoadPlan(self._prefix, hashes, reads)

    def close(self, hits: int) -> None:
        """The engine has decided: report what it looked up and that ``hits`` leading blocks were there. Idempotent."""
        if not self._closed:
            self._closed = True
            chain = [self._prefix + block_hash for block_hash in self._hashes[:LOOKED_KEYS_MAX]]
            if chain:
                self._session.send(Looked(chain, min(hits, len(chain))))

    def _answered(self, missing: list[int], located: Located | None) -> None:
        if located is not None:
            self._peers = {(peer.node, peer.region): peer for peer in located.peers}
            self._remote = {
                index: location
                for index, location in zip(missing, located.locations, strict=True)
                if location is not None and (location.node, location.region) in self._peers
            }
        self._waiting = False


def warm_state(answer: Answer) -> WarmState:
    if not isinstance(answer, Warm):
        raise Unavailable(f"the node answered {answer!r}")
    return WarmState(
        answer.done, answer.wanted, answer.present, answer.pulled, answer.bytes_pulled, answer.seconds, dict(answer.donors)
    )


def call(settings: Settings, make: Callable[[int], Message], seconds: float) -> Answer:
    """One question to the host's node, from any process. Raises Unavailable."""
    channel = Channel(settings.socket_path, settings.message_bytes_max, lambda _: None, lambda _: None)
    try:
        return channel.ask(make).result(seconds)
    except TimeoutError as error:
        raise Unavailable(f"the node at {settings.socket_path} did not answer within {seconds} s") from error
    finally:
        channel.close()
