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
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvshare import keys
from kvshare.autostart import ensure_node
from kvshare.channel import Answer, Channel, Pushed
from kvshare.config import Settings
from kvshare.errors import NamespaceError, RegionError, Unavailable
from kvshare.messages import (
    PROTOCOL_VERSION,
    AskWarm,
    Attach,
    Attached,
    Dropped,
    Fetching,
    Indexed,
    Locate,
    Located,
    Message,
    PeerLost,
    Purged,
    Quarantine,
    Refused,
    Warm,
    Withdraw,
)
from kvshare.places import NodeDescription, RegionDescription
from kvshare.question import Asked, Local, Mirror, Question
from kvshare.slots import Region

log = logging.getLogger("kvshare")

RECONNECT_SECONDS = (0.2, 5.0)  # first pause, longest pause


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
        wants = subscribe, warm, keys.tenant_tag(settings.tenant)
        self._attach = lambda ask: Attach(ask, PROTOCOL_VERSION, engine, namespace, block_bytes, *wants)
        self._channel: Channel | None = None
        self._region: Region | None = None
        self._retired: list[Region] = []  # mappings of former nodes: a running save may still write there
        self._node: NodeDescription | None = None
        self._description: RegionDescription | None = None
        self._index = Mirror()
        self._fetching: dict[int, Callable[[float], None]] = {}  # by the number of what we asked
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self.on_withdraw: Callable[[list[bytes]], None] | None = None  # called in the channel's thread
        self.connections = 0  # so far: another number, another node, which must be told everything anew

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

    def ask(
        self, prefix: bytes, hashes: Sequence[bytes], patience_seconds: float = 0.0, fetch_seconds: float = 0.0
    ) -> Question:
        """Start a question about a chain of blocks. Never blocks; sends at most one message. ``patience_seconds``: so much
        later may its answer be if a source has to be measured. ``fetch_seconds``: if blocks have to be fetched from disk or
        object store; what that may take for all of ``hashes`` to be worth it, 0: unknown, then ``lookup_seconds``."""
        return Question(self, prefix, hashes, patience_seconds, fetch_seconds)

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

    def local(self, prefix: bytes, hashes: Sequence[bytes]) -> Local:
        """Slots (-1: unknown) and generations of blocks in our node's region, as the node last pushed them."""
        with self._lock:
            mirror = self._index
            slots = mirror.lookup(prefix, hashes)
            return Local(mirror, slots, mirror.generations[slots])  # slot -1 reads the last entry: not looked at

    def still(self, local: Local) -> npt.NDArray[np.bool_]:
        """Which of these blocks are in their slots at this moment: asks the mapped header table, the truth."""
        with self._lock:
            region = self._region if self._index is local.mirror else None
        held = local.slots >= 0
        if region is None or not self.connected:
            return np.zeros_like(held)
        known = np.flatnonzero(held)
        held[known] = region.generations(local.slots[known]) == local.generations[known]
        return held

    def locate(self, asked: Asked, answer: Callable[[Located | None], None], fetching: Callable[[float], None]) -> bool:
        """Ask the node where blocks are; ``answer`` is called in another thread, and before it maybe ``fetching`` (seconds that
        it takes longer). False when there is no node."""
        channel = self._channel
        if channel is None or not channel.alive:
            return False
        numbers: list[int] = []

        def made(ask: int) -> Locate:
            numbers.append(ask)
            self._fetching[ask] = fetching
            return Locate(ask, *asked)

        def answered(done: Future[Answer]) -> None:
            for ask in numbers:
                self._fetching.pop(ask, None)
            answer(found if done.exception() is None and isinstance(found := done.result(), Located) else None)

        channel.ask(made).add_done_callback(answered)
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
        index = Mirror()
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
            self.connections += 1
            self._description, self._node = answer.region, answer.node
            self.notices = list(answer.notices)
        threading.Thread(target=region.populate, name="kvshare-populate", daemon=True).start()

    def _pushed(self, index: Mirror, message: Pushed) -> None:
        if isinstance(message, Fetching):
            fetching = self._fetching.get(message.ask)
            if fetching is not None:
                fetching(message.seconds)
            return
        if isinstance(message, Withdraw):
            if self.on_withdraw is not None:
                self.on_withdraw(message.keys)
            return
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

    def _lost(self, index: Mirror, reason: str) -> None:
        """In the channel's thread: forget all, reconnect in the background unless we are closing."""
        with self._lock:
            current = self._index is index
            if current:
                self._index = Mirror()
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


def warm_state(answer: Answer) -> WarmState:
    if not isinstance(answer, Warm):
        raise Unavailable(f"the node answered {answer!r}")
    return WarmState(
        answer.done, answer.wanted, answer.present, answer.pulled, answer.bytes_pulled, answer.seconds, dict(answer.donors)
    )


def purged(answer: Answer) -> Purged:
    if not isinstance(answer, Purged):
        raise Unavailable(f"the node answered {answer!r}")
    return answer


def call(settings: Settings, make: Callable[[int], Message], seconds: float) -> Answer:
    """One question to the host's node, from any process. Raises Unavailable."""
    channel = Channel(settings.socket_path, settings.message_bytes_max, lambda _: None, lambda _: None)
    try:
        return channel.ask(make).result(seconds)
    except TimeoutError as error:
        raise Unavailable(f"the node at {settings.socket_path} did not answer within {seconds} s") from error
    finally:
        channel.close()
